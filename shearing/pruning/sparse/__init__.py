"""One-shot sparsity: criterion x allocation x reconstruction over a pattern, layer by layer.

N:M means N kept of M, here and everywhere in this project.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.pruning.sparse.levels import allocate
    from shearing.pruning.sparse.one_shot import sparsify
    from shearing.pruning.sparse.patterns import Pattern, pattern_of
    from shearing.pruning.sparse.recipe import OneShotRecipe, SparsifyRecipe, load_sparsify_recipe
    from shearing.pruning.sparse.stored.manifest import read_manifest
    from shearing.pruning.sparse.stored.masks import read_masks

__all__ = [
    "OneShotRecipe",
    "Pattern",
    "SparsifyRecipe",
    "allocate",
    "load_sparsify_recipe",
    "pattern_of",
    "read_manifest",
    "read_masks",
    "sparsify",
]

__getattr__ = late(
    __name__,
    {
        "OneShotRecipe": "recipe",
        "Pattern": "patterns",
        "SparsifyRecipe": "recipe",
        "allocate": "levels",
        "load_sparsify_recipe": "recipe",
        "pattern_of": "patterns",
        "read_manifest": "stored.manifest",
        "read_masks": "stored.masks",
        "sparsify": "one_shot",
    },
)
