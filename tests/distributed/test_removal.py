"""Units that go while weights are trained: several processes take out what one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shearing.runs.recipe import Recipe
from shearing.training.checkpoints.state import read_state
from tests.distributed import runs
from tests.distributed.conftest import Once
from tests.distributed.harness import spawn

BETWEEN = {"staged": 4, "gradual": 5}
"""Steps between two removals: what the gradients have said of units so far is in their checkpoint."""


def _recipe(inputs: Path, run_dir: Path, *, way: str, engine: str = "torch") -> Recipe:
    chosen = runs.recipe(inputs, run_dir=run_dir, steps=8, checkpoint_interval=BETWEEN[way], engine=engine)
    values = chosen.model_dump(mode="json")
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
    assert runs.difference(runs.trajectory(two, "prune"), runs.trajectory(one, "prune")) < 1e-5
    checkpoints = [run_dir / "prune" / "checkpoints" / f"step-{BETWEEN[way]:08d}" for run_dir in (one, two)]
    expected, found = (read_state(checkpoint, "state")["masks"] for checkpoint in checkpoints)
    for name, saliency in expected["saliency"].items():
        assert saliency.any(), name
        torch.testing.assert_close(found["saliency"][name], saliency, rtol=1e-4, atol=1e-7)
