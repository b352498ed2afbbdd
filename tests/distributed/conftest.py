"""Runs that several tests compare theirs with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import Stage
from tests.distributed import runs
from tests.distributed.harness import spawn

Once = Callable[[Callable[[Path], Recipe], Sequence[Stage]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Folder of the run, in one process, of the recipe that a function makes for a folder; run for the first who asks.

    Nobody may change what is in it.
    """
    done: dict[tuple[str, tuple[Stage, ...]], Path] = {}

    def run_dir(recipe: Callable[[Path], Recipe], stages: Sequence[Stage]) -> Path:
        key = recipe(Path("anywhere")).to_yaml(), tuple(stages)
        if key not in done:
            folder = tmp_path_factory.mktemp("once")
            spawn(runs.train, recipe(folder / "run"), key[1], size=1, folder=folder / "out")
            done[key] = folder / "run"
        return done[key]

    return run_dir
