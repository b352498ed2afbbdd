"""Continued pretraining takes up where mask learning ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shearing.errors import ShearingError
from shearing.runs.recipe import load_recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.run import run

ALL_FROZEN = ["prune.freeze=100%", "mixture.update=constant", "prune.warmup=0 steps", "pretrain.warmup=0 steps"]
CONSTANT_RATE = [
    "prune.final_learning_rate=1.0",
    "pretrain.final_learning_rate=1.0",
]


def losses(directory: RunDirectory, stage) -> list[float]:
    lines = [json.loads(line) for line in directory.metrics(stage).read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_with_carried_moments_the_cut_cannot_be_seen_in_training(tiny_recipe: Path, tmp_path: Path):
    """Under fixed masks, 4 steps + cut + 6 steps are the same trajectory as 10 steps without a cut."""
    common = [*ALL_FROZEN, *CONSTANT_RATE]
    cut = run(load_recipe(tiny_recipe, overrides=[*common, "prune.duration=4 steps", "pretrain.duration=6 steps"]))
    whole = load_recipe(tiny_recipe, overrides=[*common, "prune.duration=10 steps", f"run_dir={tmp_path / 'whole'}"])
    uncut = run(whole, stages=["prune"])
    assert losses(cut, "prune") + losses(cut, "pretrain") == pytest.approx(losses(uncut, "prune"), rel=1e-5)


def test_a_fresh_optimizer_takes_another_way(tiny_recipe: Path, tmp_path: Path):
    common = [*ALL_FROZEN, *CONSTANT_RATE, "prune.duration=4 steps"]
    carried = run(load_recipe(tiny_recipe, overrides=common))
    fresh_recipe = load_recipe(
        tiny_recipe, overrides=[*common, "pretrain.optimizer=fresh", f"run_dir={tmp_path / 'fresh'}"]
    )
    fresh = run(fresh_recipe)
    assert carried.moments.is_file()
    assert not fresh.moments.exists()
    assert losses(fresh, "pretrain")[0] == pytest.approx(losses(carried, "pretrain")[0], rel=1e-6)
    assert abs(losses(fresh, "pretrain")[-1] - losses(carried, "pretrain")[-1]) > 1e-4


def test_moments_that_are_gone_are_asked_for(tiny_recipe: Path):
    recipe = load_recipe(tiny_recipe)
    directory = run(recipe, stages=["prune", "compact"])
    directory.moments.unlink()
    with pytest.raises(ShearingError, match=r"pretrain\.optimizer=fresh"):
        run(recipe)
    run(load_recipe(tiny_recipe, overrides=["pretrain.optimizer=fresh"]))
