"""Depth: sparsity rises in equal steps from the first layer to the last (arXiv 2502.14770)."""

from __future__ import annotations

from dataclasses import dataclass

from shearing.pruning.sparse.allocation.allocator import Allocation, Request
from shearing.pruning.sparse.allocation.wanted import allocate_wanted, progression


@dataclass(frozen=True)
class Depth:
    """Densities in arithmetic progression over the decoder layers, the first kept most; looks at no weight.

    Attributes:
        spread: half the range of densities, from first to last layer. Coarse levels mix only if it is more than half a
            step between them: 0.15 mixes N:8, whose step is 0.125, and leaves N:4 uniform.
    """

    spread: float = 0.15

    def allocate(self, request: Request) -> Allocation:
        """See `Allocator`; scores are indices of layers."""
        units = request.units
        depths = [float(unit.layer) for unit in units]
        wanted = progression(depths, spread=self.spread, units=units, budget=request.budget)
        return allocate_wanted(request, scores=depths, wanted=wanted)
