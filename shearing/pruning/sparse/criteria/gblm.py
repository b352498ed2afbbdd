"""GBLM: Wanda's score and the gradient's beside it (arXiv 2311.04902)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.sparse.criteria.facts import CRITERIA

SCALE = 100 * 128**0.5
"""Of root mean squares: the released code adds up 128 squares of 100 times the gradient, and takes the root."""

PUBLISHED_LENGTH = 2048
"""Tokens of a sequence that it is the constant of."""


@dataclass(frozen=True)
class GradientBased:
    """The weight's size times the norm of its input, plus its size times the norm of its gradient over the sequences.

    Gradients are the dense model's, norms those of inputs that have come through pruned layers. What balances the two
    is a constant alone: the published one whatever the number of sequences, and in proportion to their length, as norms
    grow with its root and gradients of a mean loss fall with it, about.
    """

    name: str = "gblm"
    needs: frozenset[Need] = CRITERIA["gblm"].needs
    follows_compensation: bool = False

    def scores(
        self, weight: Tensor, *, statistics: InputStatistics | None, first: int = 0, in_order: bool = False
    ) -> Tensor:
        """|W_ij| (‖X_j‖₂ + 100 √128 (S / 2048) √(mean over sequences of (∂l/∂W_ij)²)), S tokens a sequence."""
        del in_order
        assert statistics is not None
        assert statistics.gradients is not None
        columns = slice(first, first + weight.shape[1])
        gradients = statistics.gradients[:, columns].to(weight.device)
        scale = SCALE * statistics.length / PUBLISHED_LENGTH
        return weight.float().abs() * (statistics.squares[columns].sqrt() + scale * gradients)
