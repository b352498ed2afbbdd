"""Reconstructions: what the kept weights do about those that go. One file each, one interface; `facts` lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.pruning.sparse.reconstruction.facts import RECONSTRUCTIONS, ReconstructionFacts
    from shearing.pruning.sparse.reconstruction.reconstruction import (
        Choice,
        Reconstruction,
        prune_matrix,
        reconstructions,
        require_valid,
    )

__all__ = [
    "RECONSTRUCTIONS",
    "Choice",
    "Reconstruction",
    "ReconstructionFacts",
    "prune_matrix",
    "reconstructions",
    "require_valid",
]

__getattr__ = late(
    __name__,
    {
        "RECONSTRUCTIONS": "facts",
        "Choice": "reconstruction",
        "Reconstruction": "reconstruction",
        "ReconstructionFacts": "facts",
        "prune_matrix": "reconstruction",
        "reconstructions": "reconstruction",
        "require_valid": "reconstruction",
    },
)
