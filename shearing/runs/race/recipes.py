"""The recipe of one row: what all rows have in common, and what its method says."""

from __future__ import annotations

from pathlib import Path

from shearing.runs.race.methods import Stages
from shearing.runs.race.rows import Row, Steps
from shearing.runs.recipe import Recipe, validated
from shearing.settings.quantities import Duration
from shearing.settings.reading import Places, apply_overrides
from shearing.training.recipe import StageRecipe

OWN_OF_STAGES = {"duration", "micro_batch_size", "checkpoint_interval", "keep_last", "keep_every"}
"""Keys of training that steps before the cut do not take from the steps after it."""


def recipe_of(recipe: Recipe, *, row: Row, steps: Steps, run_dir: Path) -> Recipe:
    """A run of this row.

    Every row has one schedule of learning rates over all its steps, that of `pretrain`; its warm-up is that of the
    stage whose optimiser starts from nothing.

    Args:
        recipe: of the race.
        row: which one.
        steps: how tokens and steps of the race go together.
        run_dir: folder of the row's run.

    Raises:
        ShearingError: the row has too few steps for what the recipe or its method says.
    """
    how, length = row.contender.facts.how, row.steps or 1
    data = recipe.model_dump(mode="json")
    data["run_dir"] = str(run_dir)
    overrides = [
        f"name={row.name}",
        f"seed={row.seed}",
        "resume=auto",
        "model.save_dtype=fp32",  # judged as it was trained: rows start from models in different dtypes
        "mixture.update=constant",
        "mixture.initial_weights=uniform",
        f"prune.compensate={str(row.contender.refitted).lower()}",
        *([] if row.contender.refitted else ["prune.block_refit=null"]),
        "prune.keep_last=1",
        "pretrain.keep_last=1",
        "prune.validation_interval=null",  # rows are judged by test text, at their ends
        "pretrain.validation_interval=null",
        f"pretrain.warmup={warmup_from_nothing(recipe)}",
    ]
    if isinstance(how, Stages):
        before = steps.before_cut(row.steps, how=how)
        for name in StageRecipe.model_fields.keys() - OWN_OF_STAGES:
            data["prune"][name] = data["pretrain"][name]
        overrides += [
            *how.overrides,
            "one_schedule=true",
            f"prune.warmup={warmup_from_nothing(recipe)}",
            f"prune.duration={before} steps",
            f"pretrain.duration={row.steps - before} steps",
            "pretrain.optimizer=carried",
        ]
    else:
        overrides += ["one_schedule=false", f"pretrain.duration={length} steps", "pretrain.optimizer=fresh"]
        overrides += ["pretrain.warmup=0 steps"] if not row.steps else []
    places = Places(row.name)
    apply_overrides(data, overrides, places=places)
    return validated(data, places=places)


def warmup_from_nothing(recipe: Recipe) -> Duration:
    """The warm-up of the stage whose optimiser starts from nothing, as a share or a length of all steps."""
    prune, pretrain, length = recipe.pruning.prune, recipe.pretrain, recipe.data.sequence_length
    trains_before = prune.total_steps(sequence_length=length) > 0
    if recipe.one_schedule or pretrain.optimizer == "fresh" or not trains_before:
        return pretrain.warmup
    return Duration(steps=prune.in_steps(prune.warmup, sequence_length=length))
