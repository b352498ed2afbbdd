"""Magnitude: |W|. Needs no text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.sparse.criteria.facts import CRITERIA


@dataclass(frozen=True)
class Magnitude:
    """The size of the weight alone; the published baseline compares all weights of a matrix."""

    name: str = "magnitude"
    needs: frozenset[Need] = CRITERIA["magnitude"].needs
    follows_compensation: bool = False

    def scores(
        self, weight: Tensor, *, statistics: InputStatistics | None, first: int = 0, in_order: bool = False
    ) -> Tensor:
        """|W_ij|; see `Criterion`."""
        del statistics, first, in_order
        return weight.float().abs()
