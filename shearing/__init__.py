"""Make a language model smaller: find which parts to cut, cut them exactly, train on.

import shearing

recipe = shearing.load_recipe("recipes/demo.yaml", overrides=["pretrain.duration=200 steps"])
shearing.run(recipe)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.errors import ShearingError
from shearing.late import late

if TYPE_CHECKING:
    from shearing.pruning.sparse.one_shot import sparsify
    from shearing.pruning.sparse.recipe import SparsifyRecipe
    from shearing.runs.recipe import Recipe, load_recipe
    from shearing.runs.stages.run import compact, evaluate, pretrain, prune, run


__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "ShearingError",
    "SparsifyRecipe",
    "compact",
    "evaluate",
    "load_recipe",
    "pretrain",
    "prune",
    "run",
    "sparsify",
]

# Late, because `shear --help` and error messages should not wait for torch.
__getattr__ = late(
    __name__,
    {
        "Recipe": "runs.recipe",
        "SparsifyRecipe": "pruning.sparse.recipe",
        "compact": "runs.stages.run",
        "evaluate": "runs.stages.run",
        "load_recipe": "runs.recipe",
        "pretrain": "runs.stages.run",
        "prune": "runs.stages.run",
        "run": "runs.stages.run",
        "sparsify": "pruning.sparse.one_shot",
    },
)
