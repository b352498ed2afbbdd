"""Whether the run in a folder is this recipe's, so that its stages may go on where they were."""

from __future__ import annotations

import json
import shlex
from typing import Any

from shearing.errors import ShearingError
from shearing.runs.continuation.changes import onward_keys
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory
from shearing.settings.neutral import is_neutral, neutral_keys
from shearing.settings.reading import read_recipe_file


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


def _mend(changed: list[str], *, recipe: Recipe, directory: RunDirectory) -> str:
    """What to do: keys that only matter from here on may change from here on."""
    mend = "choose another run_dir, or take those values back to continue that run"
    if not set(changed) <= onward_keys(recipe) or not any(directory.checkpoints("pretrain").glob("step-*")):
        return mend
    now = recipe.flat()
    said = shlex.join(f"{key}={json.dumps(now[key]).strip(chr(34))}" for key in changed)
    return f"{mend}; to go on with the new ones from its newest checkpoint: shear extend {directory.path} {said}"


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
