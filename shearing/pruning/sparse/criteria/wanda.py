"""Wanda: |W_ij| ‖X_j‖₂ (arXiv 2306.11695, equation 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.sparse.criteria.facts import CRITERIA


@dataclass(frozen=True)
class Wanda:
    """The weight's size times the norm of its input; weights are compared within each output."""

    name: str = "wanda"
    needs: frozenset[Need] = CRITERIA["wanda"].needs
    follows_compensation: bool = False

    def scores(
        self, weight: Tensor, *, statistics: InputStatistics | None, first: int = 0, in_order: bool = False
    ) -> Tensor:
        """|W_ij| times the root of the mean over sequences of Σ x_j²: the paper's norm but for one constant."""
        del in_order
        assert statistics is not None
        norms = statistics.squares[first : first + weight.shape[1]].sqrt()
        return weight.float().abs() * norms
