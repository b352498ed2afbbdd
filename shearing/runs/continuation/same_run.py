"""Whether the run in a folder is this recipe's, so that its stages may go on where they were."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from shearing.errors import ShearingError
from shearing.models.loading import load_config
from shearing.models.stored.saving import DTYPES
from shearing.models.stored.stored_model import dtype_of_weights
from shearing.runs.continuation.cascade import first_source
from shearing.runs.continuation.changes import changes_of, onward_keys
from shearing.runs.continuation.moved import place_in_cascade
from shearing.runs.recipe import Recipe, overridden
from shearing.runs.run_directory import RunDirectory
from shearing.settings.neutral import is_neutral, neutral_keys
from shearing.settings.reading import read_recipe_file
from shearing.training.checkpoints.checkpoints import checkpoints_in

AT_THE_END = {"model.save_dtype": "--dtype", "target.vocab_size": "--vocab-size"}
"""Neutral keys that pretraining heeds when it ends, and never again -> the option of `shear export` for the same."""

_IN_CASCADE = ("model.source", "prune.moments_of")
"""Keys that a cascade sets to folders of its own, which are moved with it."""


def require_same_run(recipe: Recipe, *, directory: RunDirectory) -> None:
    """Check that what a folder holds was made by this recipe, but for neutral keys and those not yet used.

    Raises:
        ShearingError: another recipe's run, or any run with resume=never.
    """
    if not directory.recipe.is_file():
        return
    if recipe.resume == "never":
        raise ShearingError(
            "run_dir",
            value=str(directory.path),
            allowed="with resume=never, a folder that holds no run",
            mend="choose another run_dir, remove the folder, or set resume=auto to continue that run",
        )
    earlier = _flat(read_recipe_file(directory.recipe, overrides=())[0])
    now = _flat(recipe.model_dump(mode="json"))
    for key in _IN_CASCADE:
        if isinstance(place := earlier.get(key), str) and place != now.get(key):
            earlier[key] = place_in_cascade(place, was=Path(earlier["run_dir"]), now=recipe.run_dir)
    neutral = neutral_keys(Recipe)
    changed = sorted(
        key
        for key in earlier.keys() | now.keys()
        if earlier.get(key) != now.get(key)
        and not is_neutral(key, among=neutral)
        and _is_used(key, directory=directory, one_schedule=recipe.one_schedule)
    )
    if changed:
        raise ShearingError(
            "run_dir",
            value=str(directory.path),
            allowed="a folder without a run, or with a run of this recipe; what differs from its recipe.yaml: "
            + "; ".join(f"{key} was {earlier.get(key)!r} and is {now.get(key)!r}" for key in changed),
            mend=_mend(changed, recipe=recipe, directory=directory),
        )


def as_made(recipe: Recipe, *, directory: RunDirectory) -> tuple[Recipe, list[str]]:
    """A recipe that claims nothing of a finished model that it was not written with, and what to say of that.

    Args:
        recipe: of this run, see `require_same_run`.
        directory: the run's.

    Returns:
        The recipe to keep in the folder, and a line for each key that comes too late: what makes it now.
    """
    if not directory.is_complete("pretrain") or not directory.recipe.is_file():
        return recipe, []
    earlier = _flat(read_recipe_file(directory.recipe, overrides=())[0])
    now = _flat(recipe.model_dump(mode="json"))
    late = [key for key in AT_THE_END if key in earlier.keys() & now.keys() and earlier[key] != now[key]]
    if not late:
        return recipe, []
    said = [
        f"{key}={json.dumps(now[key]).strip(chr(34))} comes too late: pretrain is complete, with "
        f"{key}={json.dumps(earlier[key]).strip(chr(34))}; {_way_to(key, recipe=recipe, directory=directory)}"
        for key in late
    ]
    return overridden(recipe, overrides=[f"{key}={json.dumps(earlier[key])}" for key in late]), said


def _way_to(key: str, *, recipe: Recipe, directory: RunDirectory) -> str:
    """What makes a finished model as a key says that pretraining has not heeded."""
    value = recipe.flat()[key]
    if value is None:
        return f"{directory.model} has all tokens"
    if value == "source":
        first = first_source(recipe)
        config = load_config(first.source, revision=first.revision)
        stored = dtype_of_weights(first.source, config=config)
        value = next(name for name, dtype in DTYPES.items() if dtype == stored)
    return f"to have it: shear export {shlex.quote(str(directory.path))} -o NEW_DIR {AT_THE_END[key]} {value}"


def _mend(changed: list[str], *, recipe: Recipe, directory: RunDirectory) -> str:
    """What to do: keys that only matter from here on may change from here on."""
    if changes_of(directory):
        path, own = (shlex.quote(str(each)) for each in (directory.path, directory.recipe))
        return (
            f"choose another run_dir, or continue that run, which was extended, by its own recipe: shear run {own}; "
            f"to change more of it: shear extend {path} KEY=VALUE"
        )
    mend = "choose another run_dir, or take those values back to continue that run"
    newest = max(checkpoints_in(directory.checkpoints("pretrain")), default=0)
    if not set(changed) <= onward_keys(recipe) or not newest:
        return mend
    values = {key: json.dumps(recipe.flat()[key]).strip(chr(34)) for key in changed}
    steps = recipe.pretrain.total_steps(sequence_length=recipe.data.sequence_length)
    if steps <= newest:
        if changed == ["pretrain.duration"]:
            return mend
        values["pretrain.duration"] = f"{2 * newest} steps"  # from the last step there is nothing to go on to
    said = shlex.join([str(directory.path), *(f"{key}={value}" for key, value in values.items())])
    return f"{mend}; to go on with the new ones from its newest checkpoint: shear extend {said}"


def _is_used(key: str, *, directory: RunDirectory, one_schedule: bool) -> bool:
    """Whether a stage that has begun reads `key`."""
    section = key.partition(".")[0]
    if one_schedule and key == "pretrain.duration":
        return directory.prune.exists() or directory.pretrain.exists()
    if section in ("pretrain", "family") or key == "mixture.pretrain_interval":
        return directory.pretrain.exists()
    if section == "sparsify":
        return directory.sparsify.exists() or directory.pretrain.exists()
    return any(folder.exists() for folder in (directory.prune, directory.sparsify, directory.pretrain))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix.rstrip("."): value}
    return {key: leaf for name, below in value.items() for key, leaf in _flat(below, f"{prefix}{name}.").items()}
