"""GBLM: Wanda's score and the gradient's beside it (arXiv 2311.04902)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.sparse.criteria.facts import CRITERIA

SCALE = 100 * 128**0.5
"""Of root mean squares: the released code adds up 128 squares of 100 times the gradient, and takes the root."""


@dataclass(frozen=True)
class GradientBased:
    """The weight's size times the norm of its input, plus its size times the norm of its gradient over the sequences.

    Gradients are the dense model's, norms those of inputs that have come through pruned layers. What balances the two
    is a constant alone; it is the published one whatever the number of sequences.
    """

    name: str = "gblm"
    needs: frozenset[Need] = CRITERIA["gblm"].needs
    follows_compensation: bool = False

    def scores(self, weight: Tensor, *, statistics: InputStatistics | None, first: int = 0) -> Tensor:
        """|W_ij| (‖X_j‖₂ + 100 √128 √(mean over sequences of (∂l/∂W_ij)²))."""
        assert statistics is not None
        assert statistics.gradients is not None
        columns = slice(first, first + weight.shape[1])
        gradients = statistics.gradients[:, columns].to(weight.device)
        return weight.float().abs() * (statistics.squares[columns].sqrt() + SCALE * gradients)
