"""Rank: the more the loss minds a unit, the more of it is kept, by rank (allocation of arXiv 2310.09499)."""

from __future__ import annotations

from dataclasses import dataclass

from shearing.pruning.sparse.allocation.allocator import Allocation, Request
from shearing.pruning.sparse.allocation.sensitivity import Labels, fisher_trace
from shearing.pruning.sparse.allocation.wanted import allocate_by_traces


@dataclass(frozen=True)
class Rank:
    """Densities in arithmetic progression over ranks of sensitivity, the most sensitive kept most.

    Sparsity s = (S - a) + rank * 2 a / (U - 1), rank 0 for the most sensitive of U units, shifted by one constant to
    the budget where units differ in size. The paper estimates sensitivity by the trace of the Hessian; here it is that
    of the empirical Fisher information per weight, a mean: the loss that a share of a unit's weights costs and the
    weights that it frees both grow with its size, so their ratio does not. Where blocks are alike, they rank as by
    their sums.

    Attributes:
        spread: a, half the range of densities. Coarse levels mix only if it is more than half a step between them:
            0.15 mixes N:8, whose step is 0.125, and leaves N:4 uniform.
        labels, seed: see `fisher_trace`.
    """

    spread: float = 0.15
    labels: Labels = "true"
    seed: int = 0

    def allocate(self, request: Request) -> Allocation:
        """See `Allocator`; scores are traces divided by numbers of weights."""
        assert request.calibration is not None
        traces = fisher_trace(
            request.source,
            matrices=request.matrices,
            calibration=request.calibration,
            compute=request.compute,
            labels=self.labels,
            seed=self.seed,
            console=request.console,
        )
        return allocate_by_traces(request, traces=traces, spread=self.spread)
