"""SparseGPT's score: w² / [H⁻¹]_jj, of Optimal Brain Surgeon (arXiv 2301.00774, equation 5 and section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.sparse.criteria.facts import CRITERIA


@dataclass(frozen=True)
class SparseGPT:
    """What removing the weight costs in squared error of the output, if the others make up for it.

    As published, with reconstruction `obs`: scores are of compensated weights, columns before the weight's own are
    fixed, and unstructured masks compare all rows of a block of 128 columns. Where a mask is chosen at once, all other
    columns make up for it.
    """

    name: str = "sparsegpt"
    needs: frozenset[Need] = CRITERIA["sparsegpt"].needs
    follows_compensation: bool = True

    def scores(
        self, weight: Tensor, *, statistics: InputStatistics | None, first: int = 0, in_order: bool = False
    ) -> Tensor:
        """w² / [H⁻¹]_jj, in order that of what is left of H; see `InverseFactor`. Inputs always zero score 0."""
        assert statistics is not None
        factor, columns = statistics.factor(), slice(first, first + weight.shape[1])
        inverse_I = factor.inverse_diagonal(in_order=in_order)[columns]
        return (weight.float().square() / inverse_I).masked_fill(factor.dead[columns], 0.0)
