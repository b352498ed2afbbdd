"""Processes of tests have what takes seconds to import when they start (see `tests.preload`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shearing.runs.recipe import Recipe
from tests.distributed import runs
from tests.distributed.harness import spawn

FEW = 30


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_run_imports_few_modules(engine: str, tiny_inputs: Path, tmp_path: Path) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    recipe = runs.recipe(tiny_inputs, run_dir=tmp_path / "run", engine=engine, zero_stage=3, steps=8)
    spawn(_train_and_look, recipe, size=1, folder=tmp_path / "out")


def _train_and_look(recipe: Recipe) -> None:
    before = set(sys.modules)
    assert "tests.preload" in before
    runs.train(recipe, ("prune", "compact", "pretrain"))
    late = sorted(set(sys.modules) - before)
    assert len(late) < FEW, late
