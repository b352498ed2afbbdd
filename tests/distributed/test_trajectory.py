"""The same maths everywhere: engines, ZeRO stages, numbers of processes and splits of a batch give one trajectory.

`trajectory.json` beside this file is that trajectory, committed, and what a run says of the masks that it ends with.
After a change that is meant to change it: `UPDATE_TRAJECTORY=1 python -m pytest tests/distributed/test_trajectory.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import Stage
from tests.distributed import runs
from tests.distributed.conftest import Once
from tests.distributed.harness import spawn

COMMITTED = Path(__file__).with_name("trajectory.json")
TOLERANCE = 1e-5
STAGES: tuple[Stage, ...] = ("prune", "compact", "pretrain")
BF16_TOO = "FSDP2, 2 processes, layers stay whole, sums of each micro-batch"
OFFLOADED = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}

CLASSES: dict[str, tuple[int, dict[str, Any]]] = {
    "torch, 1 process": (1, {"micro_batch_size": 2}),
    "torch, 1 process, micro-batches of 1": (1, {}),
    "torch, 2 processes": (2, {}),
    "torch, 4 processes": (4, {}),
    "ZeRO-0, 2 processes": (2, {"engine": "deepspeed", "zero_stage": 0}),
    "ZeRO-1, 1 process": (1, {"engine": "deepspeed", "zero_stage": 1}),
    "ZeRO-1, 2 processes": (2, {"engine": "deepspeed", "zero_stage": 1, "micro_batch_size": 2}),
    "ZeRO-2, 2 processes": (2, {"engine": "deepspeed", "zero_stage": 2}),
    "ZeRO-2, 4 processes": (4, {"engine": "deepspeed", "zero_stage": 2}),
    "ZeRO-3, 1 process": (1, {"engine": "deepspeed", "zero_stage": 3, "micro_batch_size": 2}),
    "ZeRO-3, 2 processes": (2, {"engine": "deepspeed", "zero_stage": 3}),
    "ZeRO-3, 4 processes": (4, {"engine": "deepspeed", "zero_stage": 3}),
    "ZeRO-3, 2 processes, offloaded": (2, {"engine": "deepspeed", "zero_stage": 3, **OFFLOADED}),
    "ZeRO-2, 2 processes, offloaded": (2, {"engine": "deepspeed", "zero_stage": 2, "offload_optimizer": "cpu"}),
    "FSDP2, 2 processes, checkpointing": (2, {"engine": "fsdp2", "activation_checkpointing": "full"}),
    BF16_TOO: (
        2,
        {
            "engine": "fsdp2",
            "reshard_after_forward": False,
            "sum_gradients": "micro_batch",
            "activation_checkpointing": "selective",
        },
    ),
    "ZeRO-2, 2 processes, checkpointing": (
        2,
        {"engine": "deepspeed", "zero_stage": 2, "activation_checkpointing": "selective"},
    ),
    "ZeRO-3, 2 processes, checkpointing": (
        2,
        {"engine": "deepspeed", "zero_stage": 3, "activation_checkpointing": "full"},
    ),
}


def _recipe(inputs: Path, run_dir: Path, **settings: Any) -> Recipe:
    """With one checkpoint, at the end: `test_resume` is about those on the way."""
    return runs.recipe(inputs, run_dir=run_dir, checkpoint_interval=runs.STEPS, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ZeRO-1, 2 processes", "ZeRO-2, 2 processes", "ZeRO-3, 2 processes", BF16_TOO])
def test_bf16_stays_close(name: str, tiny_inputs: Path, tmp_path: Path) -> None:
    _, settings = CLASSES[name]
    if settings["engine"] == "deepspeed":
        pytest.importorskip("deepspeed")
    recipe = _recipe(tiny_inputs, tmp_path / "run", **settings, precision="bf16")
    spawn(runs.train, recipe, STAGES, size=2, folder=tmp_path / "out")
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    for stage in ("prune", "pretrain"):
        expected = [line["loss"] for line in committed[stage] if "loss" in line]
        found = [line["loss"] for line in runs.trajectory(tmp_path / "run", stage) if "loss" in line]
        assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch, 2 processes", "ZeRO-2, 2 processes", "ZeRO-3, 2 processes"])
def test_straight_through_masks_have_one_trajectory_too(
    name: str, tiny_inputs: Path, tmp_path: Path, once: Once
) -> None:
    """Which ranks a step gives is a matter of rounding where two gradients are nearly equal; here none are."""
    size, settings = CLASSES[name]
    if settings.get("engine") == "deepspeed":
        pytest.importorskip("deepspeed")
    alone = once(lambda run_dir: _straight_through(tiny_inputs, run_dir, CLASSES["torch, 1 process"][1]), STAGES)
    many = tmp_path / "run"
    spawn(runs.train, _straight_through(tiny_inputs, many, settings), STAGES, size=size, folder=tmp_path / "out")
    found = [{stage: runs.trajectory(run_dir, stage) for stage in ("prune", "pretrain")} for run_dir in (alone, many)]
    assert runs.difference(*found) < TOLERANCE


def _straight_through(inputs: Path, run_dir: Path, settings: dict[str, Any]) -> Recipe:
    return _recipe(inputs, run_dir, estimator="straight_through", **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_one_trajectory(name: str, tiny_inputs: Path, tmp_path: Path) -> None:
    size, settings = CLASSES[name]
    if settings.get("engine") == "deepspeed":
        pytest.importorskip("deepspeed")
    run_dir = tmp_path / "run"
    spawn(runs.train, _recipe(tiny_inputs, run_dir, **settings), STAGES, size=size, folder=tmp_path / "out")
    found: dict[str, Any] = {stage: runs.trajectory(run_dir, stage) for stage in ("prune", "pretrain")}
    assert [line["step"] for line in found["prune"] if "loss" in line] == list(range(1, runs.STEPS + 1))
    summary = json.loads((run_dir / "prune" / "summary.json").read_text(encoding="utf-8"))
    found["masks"] = {name: summary[name] for name in ("units", "kept", "changed_from_start", "ever_in_doubt")}
    if os.environ.get("UPDATE_TRAJECTORY") and name == next(iter(CLASSES)):
        COMMITTED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    for part, content in found.items():
        assert runs.difference(committed[part], content) < TOLERANCE, part
