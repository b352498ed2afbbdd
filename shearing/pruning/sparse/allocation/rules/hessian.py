"""hessian: rank of sensitivity, which is the trace of the loss' Hessian (arXiv 2310.09499)."""

from __future__ import annotations

from dataclasses import dataclass

from shearing.pruning.sparse.allocation.allocator import Allocation, Request
from shearing.pruning.sparse.allocation.hessian_trace import hessian_trace
from shearing.pruning.sparse.allocation.wanted import allocate_by_traces


@dataclass(frozen=True)
class HessianRank:
    """Densities in arithmetic progression over ranks of the trace of the Hessian per weight, as published.

    `rank` is the same by the Fisher information, which one backward pass estimates.

    Attributes:
        spread: half the range of densities.
        seed: of the probes.
    """

    spread: float = 0.1
    seed: int = 0

    def allocate(self, request: Request) -> Allocation:
        """See `Allocator`; scores are traces divided by numbers of weights."""
        assert request.calibration is not None
        traces = hessian_trace(
            request.source,
            matrices=request.matrices,
            calibration=request.calibration,
            compute=request.compute,
            seed=self.seed,
            console=request.console,
        )
        return allocate_by_traces(request, traces=traces, spread=self.spread)
