"""What a criterion is: it says how much each weight matters."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics, Need

Group = Literal["row", "layer", "cumulative"]


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
    def group(self) -> Group:
        """Weights that are compared with each other where the pattern is unstructured, as published."""
        ...

    @property
    def follows_compensation(self) -> bool:
        """Whether scores are of weights as compensated so far, where a reconstruction compensates column by column."""
        ...

    def scores(self, weight: Tensor, *, statistics: InputStatistics | None, first: int = 0) -> Tensor:
        """Scores of neighbouring columns of a matrix.

        Args:
            weight: [O, columns], any dtype.
            statistics: of the inputs of the whole matrix; None where nothing is needed.
            first: index of the first of these columns in the whole matrix.

        Returns:
            [O, columns] fp32, not negative.
        """
        ...
