"""Uniform: the same pattern everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from shearing.errors import ShearingError
from shearing.pruning.sparse.allocation.allocator import Allocation, Request


@dataclass(frozen=True)
class Uniform:
    """The one level whose density is the budget."""

    def allocate(self, request: Request) -> Allocation:
        """See `Allocator`."""
        for level in request.levels:
            if level.density == request.budget:
                return Allocation({matrix.name: level for matrix in request.matrices})
        levels = ", ".join(f"{level} ({float(1 - level.density):g})" for level in request.levels)
        raise ShearingError(
            "sparsity",
            value=float(1 - request.budget),
            allowed=f"that of a level: {levels}",
            mend="give one of the two, sparsity or pattern, or make them agree",
        )
