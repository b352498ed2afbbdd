"""SparseGPT's score: w² / [H⁻¹]_jj, of Optimal Brain Surgeon (arXiv 2301.00774, equation 5 and section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.sparse.criteria.facts import CRITERIA


@dataclass(frozen=True)
class SparseGPT:
    """What removing the weight costs in squared error of the output, once the columns before it are fixed.

    As published, with reconstruction `obs`: scores are of compensated weights, and unstructured masks compare all rows
    of a block of 128 columns.
    """

    name: str = "sparsegpt"
    needs: frozenset[Need] = CRITERIA["sparsegpt"].needs
    follows_compensation: bool = True

    def scores(self, weight: Tensor, *, statistics: InputStatistics | None, first: int = 0) -> Tensor:
        """w² / U_jj²; see `InverseFactor`."""
        assert statistics is not None
        diagonal = statistics.factor().upper.diagonal()[first : first + weight.shape[1]]
        return (weight.float() / diagonal).square()
