"""A cascade: ordinary runs one after the other, each from the model that the one before has trained.

Optimiser state goes on from run to run with the weights that stay, and the teacher of all of them is the first source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearing.errors import ShearingError
from shearing.models.recipe import ModelRecipe
from shearing.models.shape import Shape, config_for, resolve_target
from shearing.objectives.recipe import SOURCE
from shearing.runs.continuation.moved import CASCADE, folder_of_last, recipe_in
from shearing.runs.continuation.recipe import CascadeRecipe, on_the_way
from shearing.runs.recipe import Recipe, validated
from shearing.runs.run_directory import RunDirectory
from shearing.settings.reading import Places

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def cascade_of(recipe: Recipe) -> list[Recipe]:
    """The runs of a recipe in order, the last in its own folder; of one without a cascade, itself.

    Raises:
        ShearingError: a run contradicts itself, though the recipe does not.
    """
    if recipe.cascade is None or recipe.target is None:
        return [recipe]
    names, targets = list(recipe.cascade.targets), [*recipe.cascade.targets.values(), recipe.target]
    made: list[Recipe] = []
    for number, target in enumerate(targets):
        data = recipe.model_dump(mode="json")
        data["cascade"], data["target"] = None, target.model_dump(mode="json")
        if made:
            _go_on(data, recipe=recipe, before=RunDirectory(made[-1].run_dir))
        if number < len(names):
            _end_early(data, recipe=recipe, name=names[number], number=number)
        made.append(validated(data, places=Places(data["name"])))
    return made


def runs_before(recipe: Recipe) -> list[Recipe]:
    """The runs of a cascade that have led to a run's source, from the first on, as their folders have them.

    Args:
        recipe: of a run; none have where its source is not the model of a run on the way of a cascade.

    Raises:
        ShearingError: the recipe of one of them cannot be read.
    """
    source = Path(recipe.model.source)
    before = RunDirectory(source.parent.resolve())
    if source.name != before.model.name or before.path.parent.name != CASCADE or not before.recipe.is_file():
        return []
    found = recipe_in(before)
    return [*runs_before(found), found]


def first_source(recipe: Recipe) -> ModelRecipe:
    """The model that a run's cascade began with; of a run without one, its own source.

    Raises:
        ShearingError: see `runs_before`.
    """
    return next(iter(runs_before(recipe)), recipe).model


def as_one(runs: Sequence[Recipe]) -> Recipe:
    """The recipe whose runs these are, see `cascade_of`; the last as it is, where they are of no one cascade.

    Args:
        runs: in order, as `runs_before` has them, and the one that they led to.
    """
    *before, last = runs
    if not before or len({folder_of_last(each.run_dir.resolve()) for each in runs}) > 1:
        return last
    first = before[0]
    made: dict[str, Any] = {
        "model": last.model.model_copy(update={"source": first.model.source, "revision": first.model.revision}),
        "cascade": CascadeRecipe(
            targets={each.run_dir.name: each.pruning.target for each in before}, duration=first.pretrain.duration
        ),
    }
    settings = first.pruning.prune
    made["prune"] = last.pruning.prune.model_copy(update={"rotate": settings.rotate, "moments_of": settings.moments_of})
    if last.distill is not None and first.distill is not None:
        teacher = {"teacher": first.distill.teacher, "revision": first.distill.revision}
        made["distill"] = last.distill.model_copy(update=teacher)
    return last.model_copy(update=made)


def require_shrinking(recipe: Recipe, *, source: PretrainedConfig) -> None:
    """Check that every target is one that the model before it can become, and smaller.

    Args:
        recipe: of the cascade.
        source: config of the first source.

    Raises:
        ShearingError: one is not; it is named.
    """
    if recipe.cascade is None or recipe.target is None:
        return
    config, shape = source, Shape.of(source)
    for name, target in {**recipe.cascade.targets, "": recipe.target}.items():
        field = f"cascade.targets.{name}" if name else "target"
        left = shape.num_parameters() if target.parameters is None else target.parameters
        if target.parameters is None:
            try:
                after = resolve_target(target, source=config)
            except ShearingError as error:
                raise ShearingError(
                    f"{field} ({error.field})", value=error.value, allowed=error.allowed, mend=error.mend
                ) from None
            left = after.num_parameters()
        if left >= shape.num_parameters():
            raise ShearingError(
                field,
                value=f"{left:,} parameters",
                allowed=f"fewer than the {shape.num_parameters():,} of what it is cut from",
                mend="order the list from large to small; the source is larger than all of them",
            )
        if target.parameters is not None:
            # Its shape is not known before it is learned: sizes that follow are compared where they are reached.
            return
        config = config_for(config, shape=after, attention_layers=range(after.num_hidden_layers))
        shape = dataclasses.replace(after)


def _go_on(data: dict[str, Any], *, recipe: Recipe, before: RunDirectory) -> None:
    """A run from what the one before has trained."""
    data["model"] |= {"source": str(before.model), "revision": None}
    if recipe.pretrain.carries:
        data["prune"]["moments_of"] = str(before.path)
    data["prune"]["rotate"] = "none"  # it is in the basis of the first; moments would not follow into another
    if recipe.distill is not None and recipe.distill.teacher == SOURCE:
        data["distill"] |= {"teacher": recipe.model.source, "revision": recipe.model.revision}


def _end_early(data: dict[str, Any], *, recipe: Recipe, name: str, number: int) -> None:
    """A run on the way, with a folder and a length of its own."""
    assert recipe.cascade is not None
    short = on_the_way(recipe.cascade, pretrain=recipe.pretrain, sequence_length=recipe.data.sequence_length)
    data["name"] = f"{recipe.name}-{name}"
    data["run_dir"] = str(recipe.run_dir / CASCADE / name)
    data["seed"] = recipe.seed + number + 1  # other text first than in the last run
    data["model"]["save_dtype"] = "fp32"
    data["pretrain"]["duration"] = str(short.duration)
