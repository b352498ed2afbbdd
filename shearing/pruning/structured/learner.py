"""The masks' side of a pruning step: draw, penalty, ascent and descent, freeze at exactly the target shape.

Everything here is fp32, equal on all processes, and outside the training engine: its own AdamW, one flat
all-reduce a step, noise that depends on (seed, step, draw) alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from shearing.errors import ShearingError
from shearing.models.cutting import Selection
from shearing.models.masked import Masks
from shearing.models.shape import Shape
from shearing.pruning.structured.constraint import Constraint
from shearing.pruning.structured.estimators.estimator import Estimator
from shearing.pruning.structured.estimators.registry import ESTIMATORS, no_budget
from shearing.pruning.structured.granularities import as_masks, granularities_of
from shearing.pruning.structured.mask_settings import MaskSettings
from shearing.pruning.structured.parameter_budget import (
    CONSTRAINT,
    ParameterBudget,
    count_parameters,
    round_to_budget,
    uniform_shape,
)
from shearing.pruning.structured.rounding import changed_units, ranks, round_to_target, shape_of
from shearing.pruning.structured.starts import graded_start, open_start
from shearing.training.engines.gradient_sum import sum_in_one_exchange

# Below any difference of log_alpha that learning makes.
_TIE = 1e-4

OPEN = "open"
"""Said instead of a number of changed units, where the start chose none."""


class MaskLearner:
    """log_alpha of every granularity, their multipliers, and the optimiser of both.

    Args:
        granularities: names as in a recipe.
        source: sizes of the source model.
        target: shape to reach, or a parameter budget.
        settings: rates and durations.
        scores: of a metric, that grade the initial log_alpha around the target; None: every unit open (the paper).
        device: where masks live.

    Raises:
        ShearingError: the target cannot be reached with these granularities.
    """

    def __init__(
        self,
        granularities: Sequence[str],
        *,
        source: Shape,
        target: Shape | ParameterBudget,
        settings: MaskSettings,
        scores: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source, self.target, self.settings = source, target, settings
        shape = target if isinstance(target, Shape) else None
        self.granularities = granularities_of(granularities, source=source, target=shape)
        self.device = torch.device(device)
        self._constraint = Constraint(
            self.granularities, source=source, target=target, warmup_steps=settings.sparsity_warmup_steps
        )
        if scores is None:
            start = open_start(self.granularities, settings=settings)
        else:
            shares = self._constraint.shares(step=0)
            final = self._constraint.final_shares
            start = graded_start(
                scores, granularities=self.granularities, shares=shares, final=final, settings=settings
            )
        self._start = None if scores is None else start
        self._order = {name: order.to(self.device) for name, order in start.order.items()}
        self._fixed: dict[str, Tensor] | None = None
        self.log_alpha = nn.ParameterDict(
            {name: nn.Parameter(value.clone()) for name, value in start.log_alpha.items()}
        )
        self.log_alpha.to(device)
        if shape is None and not ESTIMATORS[settings.estimator].budgets:
            raise no_budget(settings.estimator)
        estimator: type[Estimator] = resolve_name(ESTIMATORS[settings.estimator].home)
        self.estimator = estimator(
            dict(self.log_alpha.items()),
            constraint=self._constraint,
            settings=settings,
            places=self._places,
        )
        self._modules = nn.ModuleList([self.log_alpha, self.estimator.multipliers]).to(device)
        self._in_doubt = {
            name: torch.zeros(value.shape, dtype=torch.bool, device=device) for name, value in self.log_alpha.items()
        }
        self._reached: dict[str, Tensor] = {}

    # -- masks -----------------------------------------------------------------------------------------------------

    def sample(self, *, step: int, draw: int) -> Masks:
        """Masks of one share of a step's batch: the estimator's, or the fixed binary masks from `freeze_step` on.

        They depend on (seed, step, draw) and log_alpha and are the same on every process and device.
        """
        if step >= self.settings.freeze_step:
            return as_masks(self.fix_final_masks())
        return as_masks(self.estimator.masks(step=step, draw=draw))

    def final_masks(self) -> Masks:
        """Binary masks without noise at exactly the target shape (for a budget alone: within the budget).

        Whatever the step: those that are fixed, or what rounding to the final shape makes of log_alpha now.
        """
        return as_masks(self._final())

    def masks_at(self, *, step: int) -> Masks:
        """Binary masks without noise of the size of `step`, which `targets` says; from `freeze_step` on the final ones.

        While a budget shrinks, layers may differ in size even where the result is to be uniform.
        """
        return as_masks(self._at(step))

    def fix_final_masks(self) -> dict[str, Tensor]:
        """Fixes the final masks, once; by granularity. Later calls return the same."""
        self._fixed = self._final()
        return self._fixed

    def _final(self) -> dict[str, Tensor]:
        return self._rounded(dict(self.log_alpha), step=self._last_step) if self._fixed is None else self._fixed

    def _at(self, step: int) -> dict[str, Tensor]:
        if self._fixed is not None or step >= self.settings.freeze_step:
            return self._final()
        return self._rounded(dict(self.log_alpha), step=step)

    @property
    def _last_step(self) -> int:
        """A step at which the constraint asks for the target, even where the stage ends before its ramp."""
        return max(self.settings.total_steps, self.settings.sparsity_warmup_steps)

    @torch.no_grad()
    def _rounded(self, log_alpha: Mapping[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """The best units of every row, as many as the constraint asks for at `step`."""
        scores = self._in_order(log_alpha)
        if isinstance(self.target, Shape):
            return round_to_target(scores, granularities=self._constraint.granularities_at(step=step))
        parameters = round(self._constraint.targets(step=step)[CONSTRAINT])
        masks = round_to_budget(scores, granularities=self.granularities, source=self.source, parameters=parameters)
        if self.target.uniform and parameters == self.target.parameters:
            shape = uniform_shape(masks, source=self.source, budget=self.target)
            names = [g.name for g in self.granularities]
            rounded = round_to_target(scores, granularities=granularities_of(names, source=self.source, target=shape))
            # A size that came out as the source's has nothing to round: all of its units stay.
            masks = {name: rounded.get(name, torch.ones_like(value)) for name, value in scores.items()}
        return {name: mask.to(scores[name].device) for name, mask in masks.items()}

    def _in_order(self, log_alpha: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Among units at the limit of log_alpha the order they started in decides."""
        return {name: value - _TIE * self._order[name] for name, value in log_alpha.items()}

    @torch.no_grad()
    def _places(self, step: int) -> dict[str, Tensor]:
        """See `Estimator`; what rounding keeps comes first."""
        log_alpha = dict(self.log_alpha.items())
        scores, kept = self._in_order(log_alpha), self._rounded(log_alpha, step=step)
        first = 3 * self.settings.log_alpha_limit
        return {
            name: (ranks(scores[name] + first * mask) + 0.5).float() - mask.sum(-1, keepdim=True)
            for name, mask in kept.items()
        }

    def selection(self) -> Selection:
        """The units that the final masks keep.

        Raises:
            ShearingError: the target is a budget whose result was not made uniform.
        """
        masks = self.final_masks()
        return Selection.of(masks, source=self.source, target=shape_of(masks, source=self.source))

    # -- the constraint --------------------------------------------------------------------------------------------

    def expected(self, *, step: int) -> dict[str, Tensor]:
        """Expected share alive of every unit at `step`; granularity -> the shape of its log_alpha."""
        return self.estimator.alive(step=step)

    @torch.no_grad()
    def expected_parameters(self, *, step: int) -> float:
        """Parameters of the model that masks of `step` leave, in expectation, embeddings included; exact once fixed."""
        alive = self.expected(step=step) if self._fixed is None else self._fixed
        if not alive:
            return float(self.source.num_parameters())
        return float(count_parameters({name: value.double() for name, value in alive.items()}, source=self.source))

    def parameters_at(self, *, step: int) -> int:
        """Parameters of the model that `masks_at` leaves, embeddings included."""
        masks = {name: value.double() for name, value in self._at(step).items()}
        return int(count_parameters(masks, source=self.source)) if masks else self.source.num_parameters()

    def violations(self, *, step: int) -> dict[str, Tensor]:
        """Expected share alive minus the target's share at `step`: one value a row, or one for a budget."""
        return self._constraint.violations(self.expected(step=step), step=step)

    def penalty(self, *, step: int) -> Tensor:
        """What the estimator adds once to a step's loss; zero once the masks are fixed."""
        if step >= self.settings.freeze_step or not self.granularities:
            return torch.zeros((), device=self.device)
        return self.estimator.penalty(step=step)

    def sum_gradients(self, *, scale: float = 1.0) -> None:
        """Add up over processes what the step's micro-batches left, in one exchange; before the penalty's gradient.

        The penalty is the same on every process and counts once. Which units the loss reached is noted here.

        Args:
            scale: factor that the engine put on losses, and so on these gradients.
        """
        sum_in_one_exchange(self.parameters(), scale=scale)
        self._reached = {name: value.grad != 0 for name, value in self.log_alpha.items() if value.grad is not None}

    def optimizer_step(self, *, step: int, skip: Tensor | None = None) -> None:
        """One step of the estimator.

        Args:
            step: number of the step, from 0.
            skip: scalar tensor, nonzero where the step must change nothing (a non-finite loss); read on the device.
        """
        if step >= self.settings.freeze_step:
            return
        for name, reached in self._reached.items():
            self._in_doubt[name] |= reached if skip is None else reached & ~skip.bool()
        self._reached = {}
        self.estimator.update(step=step, skip=skip)

    # -- reporting and state ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def metrics(self, *, step: int) -> dict[str, Tensor]:
        """Scalars on the device: expected and target units a row, largest violation, and the estimator's own."""
        alive = self.expected(step=step)
        scalars = {f"expected/{name}": value.sum(-1).mean() for name, value in alive.items()} | self.estimator.metrics()
        for name, violation in self._constraint.violations(alive, step=step).items():
            scalars[f"violation/{name}"] = violation.abs().max()
        for name, units in self.targets(step=step).items():
            scalars[f"target/{name}"] = torch.tensor(units)
        if not isinstance(self.target, Shape) and alive:
            scalars[f"expected/{CONSTRAINT}"] = count_parameters(alive, source=self.source)
        return {name: value.detach() for name, value in scalars.items()}

    def targets(self, *, step: int) -> dict[str, float]:
        """Units a row that the constraint asks for at `step`; parameters for a budget."""
        return self._constraint.targets(step=step)

    @torch.no_grad()
    def summary(self) -> dict[str, Any]:
        """What was learned, on the host: expected against target sizes, units changed and in doubt, the rounding gap.

        The rounding gap of a granularity is the number of units that rounding to the target flips against the
        estimator's own decision (`Estimator.is_open`). `changed_from_start` are units that the final masks keep
        and the start, rounded in the same way, would not (`changed_units`); `OPEN` where it chose none.
        `ever_in_doubt` are those whose mask the loss ever had a gradient for, in a step that counted: nothing else
        can move a unit past its neighbours.
        """
        final = self._final()
        changed = self._changed_from_start(final)
        alive, is_open = (of(step=self._last_step) for of in (self.estimator.alive, self.estimator.is_open))
        targets = self.targets(step=self.settings.total_steps)
        result: dict[str, Any] = {}
        for g in self.granularities:
            own = is_open[g.name]
            flipped = int((own != (final[g.name] > 0)).sum())
            result[g.name] = {
                "units": g.units,
                "expected": float(alive[g.name].sum(-1).mean()),
                "target": targets.get(g.name, float(final[g.name].sum(-1).mean())),
                "kept": float(final[g.name].sum(-1).mean()),
                "largest_violation": float((alive[g.name].mean(-1) - final[g.name].mean(-1)).abs().max()),
                "changed_from_start": changed.get(g.name, OPEN),
                "ever_in_doubt": int(self._in_doubt[g.name].sum()),
                "rounding_gap": flipped,
                "total_units": own.numel(),
            }
        return result

    @torch.no_grad()
    def parameter_counts(self) -> dict[str, int]:
        """Parameters that masks leave, embeddings included: `learned` as they stopped moving, `kept` after rounding.

        `learned` is an expectation over the estimator's noise. Where it is far from `kept`, learning had not reached
        the target, and what is between them was chosen by rounding alone.
        """
        counts = {}
        for name, masks in (("learned", self.estimator.alive(step=self._last_step)), ("kept", self._final())):
            units = {of: value.double() for of, value in masks.items()}
            counts[name] = round(float(count_parameters(units, source=self.source))) if units else 0
        return counts if self.granularities else dict.fromkeys(counts, self.source.num_parameters())

    def _changed_from_start(self, final: Mapping[str, Tensor]) -> dict[str, int]:
        if self._start is None:
            return {}
        # A start with no uniform shape near it chooses none, whatever is learned from it.
        with suppress(ShearingError):
            log_alpha = {name: value.to(self.device) for name, value in self._start.log_alpha.items()}
            return changed_units(final, self._rounded(log_alpha, step=self._last_step))
        return {}

    def parameters(self) -> list[nn.Parameter]:
        """log_alpha of every granularity, then the multipliers."""
        return list(self._modules.parameters())

    def state_dict(self) -> dict[str, Any]:
        """log_alpha, multipliers, the optimiser's moments, units in doubt so far and the final masks once fixed."""
        return {
            "log_alpha": {name: value.detach() for name, value in self.log_alpha.items()},
            **self.estimator.state_dict(),
            "in_doubt": self._in_doubt,
            "frozen": self._fixed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, bit for bit."""
        with torch.no_grad():
            for name, value in self.log_alpha.items():
                value.copy_(state["log_alpha"][name])
        self.estimator.load_state_dict(state)
        # A checkpoint of a version that did not count has no such entry.
        for name, value in state.get("in_doubt", {}).items():
            self._in_doubt[name].copy_(value)
        fixed = state["frozen"]
        self._fixed = fixed and {name: mask.to(self.log_alpha[name].device) for name, mask in fixed.items()}
