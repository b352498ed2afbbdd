"""What a run is: its recipe, its folder, how it is launched; its stages, plan and report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.runs.context import RunContext
    from shearing.runs.recipe import Recipe, load_recipe
    from shearing.runs.run_directory import RunDirectory
    from shearing.runs.stages.evaluation.recipe import EvaluationRecipe
    from shearing.runs.stages.run import compact, evaluate, pretrain, prune, run

__all__ = [
    "EvaluationRecipe",
    "Recipe",
    "RunContext",
    "RunDirectory",
    "compact",
    "evaluate",
    "load_recipe",
    "pretrain",
    "prune",
    "run",
]

__getattr__ = late(
    __name__,
    {
        "EvaluationRecipe": "stages.evaluation.recipe",
        "Recipe": "recipe",
        "RunContext": "context",
        "RunDirectory": "run_directory",
        "compact": "stages.run",
        "evaluate": "stages.run",
        "load_recipe": "recipe",
        "pretrain": "stages.run",
        "prune": "stages.run",
        "run": "stages.run",
    },
)
