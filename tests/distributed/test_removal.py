"""Units that go while weights are trained: several processes take out what one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shearing.runs.recipe import Recipe
from tests.distributed import runs
from tests.distributed.harness import spawn


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
@pytest.mark.parametrize("way", ["staged", "gradual"])
def test_two_processes_take_out_what_one_does(way: str, engine: str, tiny_inputs: Path, tmp_path: Path) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    masks = []
    for size in (1, 2):
        folder = tmp_path / f"run-{size}"
        chosen = runs.recipe(tiny_inputs, run_dir=folder, steps=8, engine="torch" if size == 1 else engine)
        values = chosen.model_dump(mode="json")
        values["prune"] |= {"masks": way, "freeze": "2 steps", "mask_draws": 1, "removal_stages": 3}
        recipe = Recipe.model_validate(values)
        spawn(runs.train, recipe, ("prune",), size=size, folder=tmp_path / f"out-{size}")
        masks.append(load_file(folder / "prune" / "masks.safetensors"))
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name]), name
