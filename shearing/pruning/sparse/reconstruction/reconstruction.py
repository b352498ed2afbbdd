"""The choice of a mask: a criterion's scores of a matrix under a pattern. What a reconstruction asks for masks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shearing.sparsity.criteria import Criterion
from shearing.sparsity.patterns import Pattern
from shearing.sparsity.statistics import InputStatistics


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
