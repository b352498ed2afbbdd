"""What a reconstruction is, every one there is, and what it asks for masks.

A mask is chosen by a criterion's scores of a matrix under a pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """

    criterion: Criterion
    pattern: Pattern
    statistics: InputStatistics | None

    def mask(self, weight: Tensor, *, first: int = 0) -> Tensor:
        """Mask [O, columns], true where kept, of the columns of `weight` that begin at `first` in the whole matrix."""
        scores = self.criterion.scores(weight, statistics=self.statistics, first=first)
        return self.pattern.keep(scores, first=first)


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

    def prune(self, weight: Tensor, *, choice: Choice) -> tuple[Tensor, Tensor]:
        """Prune one matrix.

        Args:
            weight: [O, I], any dtype; not changed.
            choice: decides the mask.

        Returns:
            The pruned weight [O, I] fp32, zero where the mask is false; the mask [O, I] bool, true where kept.
        """
        ...


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
