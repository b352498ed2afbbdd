"""Criteria: how much each weight matters. One file each, one interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from torch import Tensor

from shearing.sparsity.statistics import InputStatistics, Need

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


def criteria() -> Mapping[str, Criterion]:
    """Every criterion by name."""
    from shearing.sparsity.criteria.magnitude import Magnitude
    from shearing.sparsity.criteria.sparsegpt import SparseGPT
    from shearing.sparsity.criteria.wanda import Wanda

    return {criterion.name: criterion for criterion in (Magnitude(), Wanda(), SparseGPT())}
