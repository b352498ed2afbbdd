"""What was changed of a run's recipe after continued pretraining had begun, and from which step on it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shearing.files.durable import read_json, write_json
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory
from shearing.settings.neutral import is_neutral, neutral_keys
from shearing.settings.reading import read_recipe_file

_OF_SCHEDULE = ("duration", "schedule", "decay", "warmup", "final_learning_rate")
_OF_STEP = ("betas", "epsilon", "weight_decay", "gradient_clipping")
_MASKS_STAY = "pretrain.ast.freeze"
_BESIDE = ("mixture.pretrain_interval", "training.precision", "training.max_skipped_steps")


def schedule_keys(recipe: Recipe) -> set[str]:
    """Keys that say how long pretraining is, what the rate does, and when masks that move (`ast`) come to rest.

    With one schedule those of mask learning too.
    """
    return _of_stages(recipe, _OF_SCHEDULE) | ({_MASKS_STAY} if recipe.pretrain.ast is not None else set())


def onward_keys(recipe: Recipe) -> set[str]:
    """Keys that may be others from a step on: a step asks for them when it is done, and none before it."""
    rates = _of_stages(recipe, ("learning_rate",))
    return schedule_keys(recipe) | rates | {f"pretrain.{name}" for name in _OF_STEP} | set(_BESIDE)


def _of_stages(recipe: Recipe, names: tuple[str, ...]) -> set[str]:
    stages = recipe.training_stages if recipe.one_schedule else ("pretrain",)
    return {f"{stage}.{name}" for stage in stages for name in names} - {"prune.duration"}


@dataclass(frozen=True)
class Change:
    """Keys that are others from a step on.

    Attributes:
        step: of continued pretraining; it and those before were trained with what the keys were.
        keys: dotted key -> what it was and what it is, as plain values.
    """

    step: int
    keys: Mapping[str, tuple[Any, Any]]

    @classmethod
    def between(cls, before: Recipe, after: Recipe, *, step: int) -> Change:
        """What differs between two recipes, without what never matters to a result."""
        earlier, now, neutral = before.flat(), after.flat(), neutral_keys(Recipe)
        found = {
            key: (earlier[key], value)
            for key, value in now.items()
            if value != earlier[key] and not is_neutral(key, among=neutral)
        }
        return cls(step, found)


def changes_of(run: RunDirectory) -> list[Change]:
    """The changes of a run, oldest first, without one that was written down and killed before the recipe was.

    Raises:
        ShearingError: their file is damaged, or the recipe.
    """
    if not run.changes.is_file():
        return []
    found = [
        Change(each["step"], {key: (values["before"], values["after"]) for key, values in each["keys"].items()})
        for each in read_json(run.changes)["changes"]
    ]
    if found and run.recipe.is_file() and _is_undone(found[-1], read_recipe_file(run.recipe, overrides=())[0]):
        found.pop()
    return found


def _is_undone(change: Change, recipe: dict[str, Any]) -> bool:
    """Whether a recipe, as plain values, is that from before a change."""
    return any(_value(recipe, key) == was != is_to_be for key, (was, is_to_be) in change.keys.items())


def _value(recipe: Any, key: str) -> Any:
    for name in key.split("."):
        recipe = recipe.get(name) if isinstance(recipe, dict) else None
    return recipe


def write_changes(run: RunDirectory, changes: list[Change]) -> None:
    """Write down all changes of a run."""
    lines = [
        {
            "step": each.step,
            "keys": {key: {"before": before, "after": after} for key, (before, after) in each.keys.items()},
        }
        for each in changes
    ]
    write_json(run.changes, {"changes": lines})


def changed_until(run: RunDirectory) -> int:
    """Steps of continued pretraining that were trained with other keys than the recipe has now."""
    return max((each.step for each in changes_of(run)), default=0)
