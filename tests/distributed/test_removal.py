"""Units that go while weights are trained: several processes take out what one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shearing.runs.recipe import Recipe
from tests.distributed import runs
from tests.distributed.conftest import Once
from tests.distributed.harness import spawn


def _recipe(inputs: Path, run_dir: Path, *, way: str, engine: str = "torch") -> Recipe:
    values = runs.recipe(inputs, run_dir=run_dir, steps=8, engine=engine).model_dump(mode="json")
    values["prune"] |= {"masks": way, "freeze": "2 steps", "mask_draws": 1, "removal_stages": 3}
    return Recipe.model_validate(values)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
@pytest.mark.parametrize("way", ["staged", "gradual"])
def test_two_processes_take_out_what_one_does(
    way: str, engine: str, tiny_inputs: Path, tmp_path: Path, once: Once
) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    one, two = once(lambda run_dir: _recipe(tiny_inputs, run_dir, way=way), ("prune",)), tmp_path / "run"
    spawn(runs.train, _recipe(tiny_inputs, two, way=way, engine=engine), ("prune",), size=2, folder=tmp_path / "out")
    expected, found = (load_file(run_dir / "prune" / "masks.safetensors") for run_dir in (one, two))
    for name, mask in expected.items():
        assert torch.equal(mask, found[name]), name
