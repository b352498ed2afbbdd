"""ISC, improved saliency: w² (H_jj + 1 / [H⁻¹]_jj), of one-shot sensitivity-aware pruning (arXiv 2310.09499)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.sparse.criteria.facts import CRITERIA


@dataclass(frozen=True)
class ImprovedSaliency:
    """What removing the weight costs if nothing makes up for it, plus what it costs if everything does.

    H is damped in both terms and [H⁻¹]_jj is as in SparseGPT's score, so that the second term is at most the first: a
    score lies between once and twice w² H_jj. (The released code adds 1 / U_jj, not its square.)
    """

    name: str = "isc"
    needs: frozenset[Need] = CRITERIA["isc"].needs
    follows_compensation: bool = True

    def scores(
        self, weight: Tensor, *, statistics: InputStatistics | None, first: int = 0, in_order: bool = False
    ) -> Tensor:
        """w² (H_jj + 1 / [H⁻¹]_jj), in order of what is left of H; see `InverseFactor`. Inputs always zero score 0."""
        assert statistics is not None
        factor = statistics.factor()
        columns = slice(first, first + weight.shape[1])
        saliency = factor.diagonal[columns] + factor.inverse_diagonal(in_order=in_order)[columns].reciprocal()
        return (weight.float().square() * saliency).masked_fill(factor.dead[columns], 0.0)
