"""OWL: units with more outliers among their Wanda scores are kept more (arXiv 2310.05175)."""

from __future__ import annotations

from dataclasses import dataclass

from shearing.pruning.sparse.allocation.allocator import Allocation, Request
from shearing.pruning.sparse.allocation.outliers import outlier_shares
from shearing.pruning.sparse.allocation.wanted import allocate_wanted, around_budget, at_least_a_step
from shearing.pruning.sparse.criteria.wanda import Wanda

PUBLISHED_SPREAD = 0.08


@dataclass(frozen=True)
class Owl:
    """Densities that follow the share of outliers in each unit, on the dense model.

    D = share of a unit's scores |W_ij| ‖X_j‖ above `outlier_ratio` times their mean; r = 2 λ (D - min) / (max - min);
    density = r - mean(r) + (1 - S), the mean weighed by parameters.

    Attributes:
        outlier_ratio: M; 5 in the published commands.
        spread: λ, half the range of densities. None: 0.08, as published, or the step between neighbouring levels where
            that is more. The published mode for N:M, where the example is of 8, lets the number kept differ by 2,
            which is a λ of one step; with 0.08, nearly all units would have the same N:8.
    """

    outlier_ratio: float = 5.0
    spread: float | None = None

    def allocate(self, request: Request) -> Allocation:
        """See `Allocator`; scores are shares of outliers."""
        units = request.units
        shares = outlier_shares(request, criterion=Wanda(), ratio=self.outlier_ratio)
        spread = at_least_a_step(PUBLISHED_SPREAD, levels=request.levels) if self.spread is None else self.spread
        lowest, highest = min(shares), max(shares)
        above = [2 * spread * (share - lowest) / (highest - lowest) if highest > lowest else 0.0 for share in shares]
        wanted = around_budget(above, units=units, budget=request.budget)
        return allocate_wanted(request, scores=shares, wanted=wanted)
