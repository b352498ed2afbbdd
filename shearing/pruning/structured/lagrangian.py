"""The constraint as a min-max game (Sheared LLaMA, section 2.1): multipliers climb while a size is off its target."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def target_at(step: int, *, final: float, warmup_steps: int) -> float:
    """Share of units alive that the constraint asks for at `step`: linear from 1 to `final`."""
    return final if warmup_steps <= 0 else 1.0 - (1.0 - final) * min(1.0, step / warmup_steps)


class Lagrangian(nn.Module):
    """Multipliers lambda_1 and lambda_2, one pair a constraint (a row of a granularity), starting at zero.

    Args:
        rows: constraint name -> shape of its multipliers, () for a single one.
        quadratic_penalty: constant added to every lambda_2, so that the constraint pulls from the first step.
    """

    def __init__(self, rows: Mapping[str, tuple[int, ...]], *, quadratic_penalty: float = 0.0) -> None:
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
