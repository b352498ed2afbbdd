"""Sparse models trained by several processes: the trajectory of one, and the same zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shearing.pruning.sparse.stored.check import differences
from shearing.pruning.sparse.stored.masks import FILE_NAME, read_masks
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory, Stage
from tests.distributed import runs
from tests.distributed.conftest import Once
from tests.distributed.harness import spawn

pytestmark = pytest.mark.slow
STAGES: tuple[Stage, ...] = ("sparsify", "pretrain")
STEPS = 8


MOVING = {"interval": "2 steps", "decay": 0.2, "ramp": "3 steps", "freeze": "2 steps"}


def recipe(inputs: Path, *, run_dir: Path, way: dict[str, Any] | None = None, **training: Any) -> Recipe:
    data = runs.recipe(inputs, run_dir=run_dir, steps=STEPS, **training).model_dump(mode="json")
    data["target"] = data["prune"] = None
    data["sparsify"] = {"criterion": "wanda", "pattern": "2:4", "samples": 12, "seqlen": 16}
    data["pretrain"] |= way or {}
    return Recipe.model_validate(data)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"engine": "deepspeed", "zero_stage": 2},
        {"engine": "deepspeed", "zero_stage": 3},
        {"way": {"lora": {"rank": 4}}},
        {"way": {"lora": {"rank": 4}}, "engine": "fsdp2"},
        {"way": {"spp": {"rank": 4}}, "engine": "fsdp2"},
        {"way": {"speft": {"share": 0.1, "samples": 2}, "ist": {"interval": "3 steps", "tokens": 64}}},
        {"way": {"speft": {"share": 0.1, "samples": 2}}, "engine": "fsdp2"},
        {"way": {"ast": MOVING}, "engine": "deepspeed", "zero_stage": 2},
        {"way": {"ast": {**MOVING, "scores": "wanda"}}, "engine": "fsdp2"},
    ],
    ids=[
        "torch",
        "ZeRO-2",
        "ZeRO-3",
        "adapters",
        "adapters under FSDP2",
        "factors under FSDP2",
        "salient weights of some layers",
        "salient weights under FSDP2",
        "masks that move under ZeRO-2",
        "masks that move by norms under FSDP2",
    ],
)
def test_two_processes_train_as_one_does(
    settings: dict[str, Any], tiny_inputs: Path, tmp_path: Path, once: Once
) -> None:
    if settings.get("engine") == "deepspeed":
        pytest.importorskip("deepspeed")
    way = settings.get("way", {})
    if "lora" in way:
        pytest.importorskip("peft")
    one = RunDirectory(once(lambda run_dir: recipe(tiny_inputs, run_dir=run_dir, way=way), STAGES))
    two = RunDirectory(tmp_path / "run")
    spawn(runs.train, recipe(tiny_inputs, run_dir=two.path, **settings), STAGES, size=2, folder=tmp_path / "out")
    assert runs.difference(runs.trajectory(two.path, "pretrain"), runs.trajectory(one.path, "pretrain")) < 1e-5
    assert differences(two.model) == []
    expected, found = (load_file(run.model / "model.safetensors") for run in (one, two))
    masks = dict(read_masks(two.model / FILE_NAME))
    assert (one.model / FILE_NAME).read_bytes() == (two.model / FILE_NAME).read_bytes()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)
        if name in masks:
            assert not weight[~masks[name]].any(), name
