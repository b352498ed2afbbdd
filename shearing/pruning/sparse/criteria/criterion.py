"""What a criterion is: it says how much each weight matters. And every one there is."""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Protocol

from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.sparse.criteria.facts import CRITERIA


class Criterion(Protocol):
    """Scores weights; the lowest go first."""

    @property
    def name(self) -> str:
        """As recipes say it."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """Statistics of the inputs that the scores are made of."""
        ...

    @property
    def follows_compensation(self) -> bool:
        """Whether scores are of weights as compensated so far, where a reconstruction compensates column by column."""
        ...

    def scores(
        self, weight: Tensor, *, statistics: InputStatistics | None, first: int = 0, in_order: bool = False
    ) -> Tensor:
        """Scores of neighbouring columns of a matrix: of all of them, unless the scores follow compensation.

        Args:
            weight: [O, columns], any dtype.
            statistics: of the inputs of the whole matrix; None where nothing is needed.
            first: index of the first of these columns in the whole matrix.
            in_order: columns before a weight's own are done with, those after it still make up for what goes; it
                matters to scores that follow compensation alone.

        Returns:
            [O, columns] fp32, not negative.
        """
        ...


def criteria() -> Mapping[str, Criterion]:
    """Every criterion by name."""
    return {name: resolve_name(facts.home)() for name, facts in CRITERIA.items()}
