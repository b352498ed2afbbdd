"""redundancy: what is kept of units leaves all of them equally redundant (arXiv 2503.18377, reconstructed).

Known of the paper, Maximum Redundancy Pruning: redundancy is the share of weights that are no outliers; the layer of
most of it is pruned a little more, again and again, until the budget is met; it follows the metric that prunes; and at
its end all layers are about equally redundant. Its procedure was not available to us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shearing.pruning.sparse.allocation.allocator import Allocation, Request, Unit
from shearing.pruning.sparse.allocation.outliers import outlier_shares
from shearing.pruning.sparse.allocation.wanted import allocate_wanted, around_budget, at_least_a_step

SPREAD = 0.1
_HALVINGS = 100


@dataclass(frozen=True)
class Redundancy:
    """Densities in proportion to shares of outliers, within `spread` of the budget.

    o is the share of a unit's scores, the criterion's own, above `outlier_ratio` times their mean on the dense model.
    Outliers are never removed, so that of what is left of a unit at density d the share 1 - o / d is redundant.
    Removing from the unit where it is highest makes it lower, so that what is reached by small steps is the same share
    in all: d = c o, with one c for all units, which the budget decides.

    Attributes:
        outlier_ratio: as OWL has it.
        spread: bound of how far densities lie from the budget. None: 0.1, or the step between neighbouring levels where
            that is more.
    """

    outlier_ratio: float = 5.0
    spread: float | None = None

    def allocate(self, request: Request) -> Allocation:
        """See `Allocator`; scores are shares of outliers."""
        units = request.units
        shares = outlier_shares(request, criterion=request.criterion, ratio=self.outlier_ratio)
        spread = at_least_a_step(SPREAD, levels=request.levels) if self.spread is None else self.spread
        wanted = equally_redundant(shares, spread=spread, units=units, budget=float(request.budget))
        return allocate_wanted(request, scores=shares, wanted=around_budget(wanted, units=units, budget=request.budget))


def equally_redundant(shares: Sequence[float], *, spread: float, units: Sequence[Unit], budget: float) -> list[float]:
    """Densities c o within `spread` of the budget, and within 0 and 1, of which the mean by parameters is the budget.

    Where too many units have no outliers for any c, the mean stays below it.

    Args:
        shares: o, of each unit.
        spread: how far densities may lie from the budget.
        units: of these shares.
        budget: mean density.
    """
    lowest, highest = max(0.0, budget - spread), min(1.0, budget + spread)
    total = sum(unit.size for unit in units)

    def at(factor: float) -> list[float]:
        return [min(highest, max(lowest, factor * share)) for share in shares]

    low, high = 0.0, 1.0 / min((share for share in shares if share > 0), default=1.0)
    for _ in range(_HALVINGS):
        factor = (low + high) / 2
        mean = sum(unit.size * density for unit, density in zip(units, at(factor), strict=True)) / total
        low, high = (factor, high) if mean < budget else (low, factor)
    return at(high)
