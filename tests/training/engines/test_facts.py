"""Engines by name: recipes, what has to be installed, and plans go by one list, and a new engine is a line in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import pytest
import torch

from shearing.errors import ShearingError
from shearing.processes.processes import Processes
from shearing.runs.context import RunContext
from shearing.runs.planning.memory import Layerwise
from shearing.runs.planning.preflight import preflight
from shearing.runs.planning.step.stage_plan import Choice
from shearing.runs.recipe import load_recipe
from shearing.training.engines.engine import EngineParts, engine_of
from shearing.training.engines.facts import ENGINES
from shearing.training.recipe import TrainingRecipe
from tests.training.engines.test_kept_zeros import OPTIMIZATION


def _parts() -> EngineParts:
    return EngineParts(
        optimization=OPTIMIZATION,
        training=TrainingRecipe(),
        device=torch.device("cpu"),
        precision=torch.float32,
        processes=Processes(),
        micro_batch_size=1,
        accumulation=1,
    )


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_is_at_home(name: str) -> None:
    engine = engine_of(name, parts=_parts())
    assert type(engine).__name__ == ENGINES[name].home.partition(":")[2]
    assert engine.loss_scale == 1.0


def test_recipes_take_the_names_of_the_list() -> None:
    assert get_args(TrainingRecipe.model_fields["engine"].annotation) == tuple(ENGINES)


def _known_as(monkeypatch: pytest.MonkeyPatch, **facts: object) -> None:
    monkeypatch.setitem(ENGINES, "torch", dataclasses.replace(ENGINES["torch"], **facts))  # type: ignore[arg-type]


def test_what_an_engine_needs_is_asked_for_by_its_name(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _known_as(monkeypatch, package="no_such_package")
    with pytest.raises(ShearingError, match=r"torch: the package no_such_package is not installed") as found:
        preflight(RunContext(load_recipe(tiny_recipe)))
    assert "shearing[no_such_package]" in str(found.value)


def test_plans_go_by_what_an_engine_shares_out(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(tiny_recipe, overrides=["training.deepspeed.zero_stage=1"])
    assert Choice.of(recipe).zero_stage == 0
    _known_as(monkeypatch, holds_as=3)
    assert Choice.of(recipe).zero_stage == 3
    _known_as(monkeypatch, holds_as=None)
    assert Choice.of(recipe).zero_stage == 1


def test_plans_know_how_fsdp2_shares_out(tiny_recipe: Path) -> None:
    assert Choice.of(load_recipe(tiny_recipe)).layerwise is None
    whole = load_recipe(tiny_recipe, overrides=["training.engine=fsdp2", "training.fsdp2.reshard_after_forward=false"])
    assert Choice.of(whole).layerwise == Layerwise(reshard=False, sums_once=True)


def test_only_engines_that_can_train_adapters(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_recipe(tiny_recipe, overrides=["pretrain.lora={}"])
    load_recipe(tiny_recipe, overrides=["pretrain.lora={}", "training.engine=fsdp2"])
    with pytest.raises(ShearingError, match=r"pretrain\.lora") as refused:
        load_recipe(tiny_recipe, overrides=["pretrain.lora={}", "training.engine=deepspeed"])
    assert "training.engine=torch or fsdp2; it is deepspeed" in str(refused.value)
    _known_as(monkeypatch, adapters=False)
    with pytest.raises(ShearingError, match=r"pretrain\.lora"):
        load_recipe(tiny_recipe, overrides=["pretrain.lora={}"])
