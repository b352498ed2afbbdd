"""The constraint as a min-max game (Sheared LLaMA, section 2.1): multipliers climb while a size is off its target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import Granularity
from shearing.pruning.structured.parameter_budget import CONSTRAINT, ParameterBudget, count_parameters


def target_at(step: int, *, final: float, warmup_steps: int) -> float:
    """Share of units alive that the constraint asks for at `step`: linear from 1 to `final`."""
    return final if warmup_steps <= 0 else 1.0 - (1.0 - final) * min(1.0, step / warmup_steps)


class Constraint:
    """What sizes masks have to have at a step: units of every row for a shape, parameters for a budget.

    Args:
        granularities: what is masked.
        source: sizes of the source model.
        target: shape or budget in the end.
        warmup_steps: linear ramp from the source to the target.
    """

    def __init__(
        self,
        granularities: Sequence[Granularity],
        *,
        source: Shape,
        target: Shape | ParameterBudget,
        warmup_steps: int,
    ) -> None:
        self._granularities, self._source, self._target = granularities, source, target
        self._warmup_steps = warmup_steps

    @property
    def rows(self) -> dict[str, tuple[int, ...]]:
        """Name of each constraint -> shape of its multipliers: a granularity's rows, or one for a budget."""
        if isinstance(self._target, Shape):
            return {granularity.name: granularity.size[:-1] for granularity in self._granularities}
        return {CONSTRAINT: ()}

    def shares(self, *, step: int) -> dict[str, float]:
        """Granularity -> the share of a row's units to be alive at `step`; for a budget, one that meets it."""
        if isinstance(self._target, Shape):
            final = {g.name: (g.target or 0) / g.units for g in self._granularities}
        else:
            final = dict.fromkeys((g.name for g in self._granularities), self._even_share(self._target))
        return {name: self._at(step, final=share) for name, share in final.items()}

    def targets(self, *, step: int) -> dict[str, float]:
        """Constraint -> units of a row to be alive at `step`; parameters for a budget."""
        if isinstance(self._target, Shape):
            shares = self.shares(step=step)
            return {g.name: g.units * shares[g.name] for g in self._granularities}
        full = self._source.num_parameters()
        return {CONSTRAINT: full * self._at(step, final=self._target.parameters / full)}

    def granularities_at(self, *, step: int) -> tuple[Granularity, ...]:
        """What is masked, with the units to keep at `step`, in whole units; for a shape."""
        targets = self.targets(step=step)
        return tuple(dataclasses.replace(g, target=max(1, round(targets[g.name]))) for g in self._granularities)

    def violations(self, alive: Mapping[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """Constraint -> share alive minus the share to be alive at `step`: one value a row, or one for a budget.

        Args:
            alive: granularity -> expected share alive of every unit.
            step: of the stage.
        """
        if isinstance(self._target, Shape):
            return {name: alive[name].mean(-1) - share for name, share in self.shares(step=step).items()}
        if not alive:
            return {}
        full = self._source.num_parameters()
        final = self._at(step, final=self._target.parameters / full)
        return {CONSTRAINT: count_parameters(alive, source=self._source) / full - final}

    def _at(self, step: int, *, final: float) -> float:
        return target_at(step, final=final, warmup_steps=self._warmup_steps)

    def _even_share(self, budget: ParameterBudget) -> float:
        """One share for all granularities that meets the budget in expectation."""
        low, high = 0.0, 1.0
        for _ in range(40):
            share = (low + high) / 2
            alive = {g.name: torch.full(g.size, share, dtype=torch.float64) for g in self._granularities}
            low, high = (
                (share, high) if count_parameters(alive, source=self._source) < budget.parameters else (low, share)
            )
        return low


class Lagrangian(nn.Module):
    """Multipliers lambda_1 and lambda_2, one pair a constraint (a row of a granularity), starting at zero.

    Args:
        rows: constraint name -> shape of its multipliers, () for a single one.
        quadratic_penalty: constant added to every lambda_2, so that the constraint pulls from the first step.
    """

    def __init__(self, rows: Mapping[str, tuple[int, ...]], *, quadratic_penalty: float) -> None:
        super().__init__()
        self.lambda_1 = nn.ParameterDict({name: nn.Parameter(torch.zeros(size)) for name, size in rows.items()})
        self.lambda_2 = nn.ParameterDict({name: nn.Parameter(torch.zeros(size)) for name, size in rows.items()})
        self.quadratic_penalty = quadratic_penalty

    def penalty(self, violations: Mapping[str, Tensor]) -> Tensor:
        """Sum over constraints of the mean over rows of lambda_1 v + (lambda_2 + c) v^2 (Sheared LLaMA, section 2.1).

        The paper sums over rows; the released code takes the mean. So do we: a row of `intermediate` is one layer's
        share of the model, one of `hidden` or `layers` is all of it, and the pull of c has to be in proportion.

        Args:
            violations: constraint -> v = expected share alive - target share, of its rows' shape.

        Returns:
            A scalar, minimised by the masks and maximised by the multipliers.
        """
        terms = [
            (self.lambda_1[name] * v + (self.lambda_2[name] + self.quadratic_penalty) * v.square()).mean()
            for name, v in violations.items()
        ]
        return torch.stack(terms).sum()
