"""A run that has been moved: its recipe, with what that names of the run's own cascade where it lies now."""

from __future__ import annotations

from pathlib import Path

from shearing.runs.recipe import Recipe, load_recipe
from shearing.runs.run_directory import RunDirectory
from shearing.settings.reading import read_recipe_file

CASCADE = "cascade"
"""Folder of the runs on the way, inside that of the last."""


def recipe_in(run: RunDirectory) -> Recipe:
    """The recipe that a run's folder holds, for where that folder is now.

    Raises:
        ShearingError: it cannot be read.
    """
    recipe = load_recipe(run.recipe)
    if recipe.run_dir.resolve() == run.path.resolve():
        return recipe
    return _found_again(recipe.model_copy(update={"run_dir": run.path}), was=recipe.run_dir)


def as_it_lies(recipe: Recipe) -> Recipe:
    """A recipe whose `run_dir` may be where its run has been moved: the rest of what it names there is there too.

    Raises:
        ShearingError: the recipe in that folder cannot be read.
    """
    stored = RunDirectory(recipe.run_dir).recipe
    was = read_recipe_file(stored, overrides=())[0].get("run_dir") if stored.is_file() else None
    return _found_again(recipe, was=Path(was)) if isinstance(was, str) else recipe


def place_in_cascade(path: str, *, was: Path, now: Path) -> str:
    """Where something is that was in the cascade of a run; itself, if it was not.

    Args:
        path: of it.
        was, now: folder of the run, the last or one on the way, then and today.
    """
    earlier, today = (folder_of_last(folder) / CASCADE for folder in (was, now))
    return str(today / Path(path).relative_to(earlier)) if Path(path).is_relative_to(earlier) else path


def folder_of_last(folder: Path) -> Path:
    """Folder of a cascade's last run, of that of any of its runs; of a run without a cascade, its own."""
    return folder.parent.parent if folder.parent.name == CASCADE else folder


def _found_again(recipe: Recipe, *, was: Path) -> Recipe:
    def here(path: str) -> str:
        place = place_in_cascade(path, was=was, now=recipe.run_dir)
        return place if Path(place).is_dir() else path

    model = recipe.model.model_copy(update={"source": here(recipe.model.source)})
    recipe = recipe.model_copy(update={"model": model})
    if recipe.prune is None or recipe.prune.moments_of is None:
        return recipe
    prune = recipe.prune.model_copy(update={"moments_of": Path(here(str(recipe.prune.moments_of)))})
    return recipe.model_copy(update={"prune": prune})
