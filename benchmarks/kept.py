"""What results in an output folder were made with, so that those of other settings are not taken for what is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shearing.files.durable import read_json, write_json
from shearing.runs.race.records import settings_of
from shearing.runs.recipe import Recipe


def require_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a folder's results, or compare them with those that are there.

    Args:
        folder: made if absent.
        settings: everything that decides a result and is not in its file's name; JSON, with paths as text.

    Raises:
        SystemExit: the folder's results are of others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, asked = folder / "settings.json", json.loads(json.dumps(settings, default=str))
    if not path.is_file():
        write_json(path, asked)
        return
    earlier = read_json(path)
    names = [name for name in {**earlier, **asked} if earlier.get(name) != asked.get(name)]
    if names:
        said = ", ".join(f"{name} {earlier.get(name)} and not {asked.get(name)}" for name in names)
        raise SystemExit(f"{folder} holds results with {said}: choose another --output")


def of_recipe(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that are not at their defaults and decide a result, with model and texts by their names."""
    evaluation, data = recipe.evaluation, recipe.data
    names = {"model": recipe.model.source, "corpus": str(data.corpus), "outside": str(evaluation.outside)}
    return settings_of(recipe, **names, split="test", precision=recipe.training.precision)
