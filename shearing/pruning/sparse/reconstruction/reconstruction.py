"""What a reconstruction is, every one there is, and what it asks for masks.

A mask is chosen by a criterion's scores of a matrix under a pattern. What is zero before is the first to go and never
comes back, whichever the three are: matrices are pruned by `prune_matrix` alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import Protocol

from torch import Tensor

from shearing.errors import ShearingError
from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.sparse.criteria.criterion import Criterion
from shearing.pruning.sparse.patterns import Pattern
from shearing.pruning.sparse.reconstruction.facts import RECONSTRUCTIONS


@dataclass(frozen=True)
class Choice:
    """Everything that decides the mask of one matrix, but for its weights.

    Attributes:
        criterion: scores the weights.
        pattern: how many are kept, and which together.
        statistics: of the matrix's inputs; None where neither criterion nor reconstruction needs any.
        gone: [O, I] bool, true where the whole matrix was zero before anything was done to it; None: nowhere.
    """

    criterion: Criterion
    pattern: Pattern
    statistics: InputStatistics | None
    gone: Tensor | None = None

    def mask(self, weight: Tensor, *, first: int = 0, in_order: bool = False) -> Tensor:
        """Mask [O, columns], true where kept, of the columns of `weight` that begin at `first` in the whole matrix.

        For `in_order` see `Criterion.scores`.
        """
        scores = self.criterion.scores(weight, statistics=self.statistics, first=first, in_order=in_order)
        gone = None if self.gone is None else self.gone[:, first : first + weight.shape[1]]
        return keep(scores, pattern=self.pattern, gone=gone, first=first)


class Reconstruction(Protocol):
    """Prunes a matrix, asking a `Choice` for the mask when it is time."""

    @property
    def name(self) -> str:
        """As recipes say it."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """Statistics of the inputs that it works with."""
        ...

    @property
    def by_columns(self) -> bool:
        """Whether weights change column by column, so that a mask can be chosen on the way."""
        ...

    @property
    def rows_apart(self) -> bool:
        """Whether what becomes of a row follows from it and its mask, whatever the other rows are."""
        ...

    def prune(self, weight: Tensor, *, choice: Choice) -> tuple[Tensor, Tensor]:
        """Prune one matrix.

        Args:
            weight: [O, I], any dtype; not changed.
            choice: decides the mask.

        Returns:
            The pruned weight [O, I] fp32, zero where the mask is false; the mask [O, I] bool, true where kept.
        """
        ...


def keep(scores: Tensor, *, pattern: Pattern, gone: Tensor | None, first: int = 0) -> Tensor:
    """Mask of neighbouring columns that counts what is gone already among what the pattern removes.

    Where more is gone than the pattern removes, the rest is kept, and the mask is sparser than the pattern.

    Args:
        scores: [O, columns], higher is kept.
        pattern: how many are kept, and which together.
        gone: [O, columns] bool, true where nothing is left to keep; None: nowhere.
        first: index of the first of these columns in the whole matrix.

    Returns:
        [O, columns] bool, true where kept.
    """
    if gone is None:
        return pattern.keep(scores, first=first)
    return pattern.keep(scores.masked_fill(gone, -math.inf), first=first).logical_and_(~gone)


def prune_matrix(weight: Tensor, *, reconstruction: Reconstruction, choice: Choice) -> tuple[Tensor, Tensor]:
    """Prune one matrix; what is zero in it stays zero.

    Args:
        weight: [O, I], any dtype; not changed.
        reconstruction: what kept weights do about those that go.
        choice: decides the mask.

    Returns:
        See `Reconstruction.prune`; the mask is false at every zero of `weight`.
    """
    gone = weight == 0
    new, mask = reconstruction.prune(weight, choice=replace(choice, gone=gone))
    assert not new[gone].any(), f"{reconstruction.name} brings back what was zero"
    return new, mask


def reconstructions() -> Mapping[str, Reconstruction]:
    """Every reconstruction by name."""
    return {name: resolve_name(facts.home)() for name, facts in RECONSTRUCTIONS.items()}


def require_valid(criterion: Criterion, *, reconstruction: Reconstruction, pattern: Pattern) -> None:
    """Raises `ShearingError` where the three cannot work together."""
    if criterion.follows_compensation and reconstruction.by_columns and pattern.whole_rows:
        raise ShearingError(
            "group",
            value="cumulative",
            allowed=f"row or layer, with {criterion.name} and {reconstruction.name}: there the mask is chosen left "
            "to right while columns are compensated, and the cumulative rule has to see whole rows first",
            mend="set group: row, or reconstruction: none, or criterion: wanda",
        )
