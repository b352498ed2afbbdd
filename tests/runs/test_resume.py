"""Runs that are killed and continued are the uninterrupted run, bit for bit. Processes and kills are real."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from shearing.pruning.sparse.stored.check import differences
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory, Stage
from shearing.runs.stages.run import run
from shearing.training.metrics import TIMING_FIELDS
from shearing.training.stage import INTERRUPTED_EXIT_CODE
from tests.conftest import tiny_recipe_data
from tests.forks import PROCESSES

STEPS = 10
SECONDS = 120.0
SPARSE: tuple[Stage, ...] = ("sparsify", "pretrain")


def _recipe(inputs: Path, *, run_dir: Path, log_interval: int = 1) -> Recipe:
    data = tiny_recipe_data(inputs, run_dir=run_dir)
    data["training"]["log_interval"] = log_interval
    for stage in ("prune", "pretrain"):
        data[stage] |= {
            "duration": f"{STEPS} steps",
            "batch_size": "4 sequences",
            "checkpoint_interval": "2 steps",
            "weight_decay": 0.1,
            "schedule": "wsd",
            "decay": "40%",
        }
    return Recipe.model_validate(data)


def _sparse_recipe(inputs: Path, *, run_dir: Path, way: dict[str, Any]) -> Recipe:
    """One-shot sparsity, then training under its masks."""
    data = _recipe(inputs, run_dir=run_dir).model_dump(mode="json")
    data["target"] = data["prune"] = None
    data["sparsify"] = {"criterion": "wanda", "pattern": "2:4", "samples": 12, "seqlen": 16}
    data["pretrain"] |= way
    return Recipe.model_validate(data)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(scope="module")
def pruned(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mask learning that nothing interrupted."""
    folder = tmp_path_factory.mktemp("pruned") / "run"
    _finish(_recipe(tiny_inputs, run_dir=folder), stage="prune")
    return folder


@pytest.fixture(scope="module")
def pretrained(pruned: Path, tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mask learning, cutting and continued pretraining that nothing interrupted."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    shutil.copytree(pruned, folder)
    for stage in ("compact", "pretrain"):
        _finish(_recipe(tiny_inputs, run_dir=folder), stage=stage)
    return folder


def _start(recipe: Recipe, *, stages: tuple[Stage, ...]) -> BaseProcess:
    process = PROCESSES.Process(target=run, args=(recipe,), kwargs={"stages": stages})
    process.start()
    return process


def _finish(recipe: Recipe, *, stage: Stage) -> None:
    _finish_all(recipe, stages=(stage,))


def _finish_all(recipe: Recipe, *, stages: tuple[Stage, ...]) -> None:
    process = _start(recipe, stages=stages)
    process.join(SECONDS)
    assert process.exitcode == 0


def _kill_when(process: BaseProcess, condition: Callable[[], bool]) -> bool:
    """Kill -9 as soon as `condition` holds; whether that was before the end."""
    deadline = time.monotonic() + SECONDS
    while process.exitcode is None and time.monotonic() < deadline:
        if condition():
            process.kill()
            process.join(SECONDS)
            return process.exitcode == -signal.SIGKILL
        time.sleep(0.0005)  # short beside a write to disk, and the core is left to the run
    return False


def _metrics(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


def _tensors(path: Path) -> dict[str, bytes]:
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def _state(folder: Path) -> str:
    # The size of metrics.jsonl depends on how many digits its timings have.
    return re.sub(r'\["metrics_bytes", \d+\]', "", (folder / "state.json").read_text())


def _assert_same(stage: Stage, *, whole: Path, folder: Path) -> None:
    expected, found = RunDirectory(whole).folder(stage), RunDirectory(folder).folder(stage)
    assert _metrics(found / "metrics.jsonl") == _metrics(expected / "metrics.jsonl")
    steps = [line["step"] for line in _metrics(found / "metrics.jsonl") if "event" not in line]
    assert steps == list(range(1, STEPS + 1))
    last = Path("checkpoints") / f"step-{STEPS:08d}"
    assert _state(found / last) == _state(expected / last)
    files = [last / "shard-00000-of-00001.safetensors", last / "state.safetensors"]
    if stage == "prune":
        files += [Path("masks.safetensors"), Path("model.safetensors")]
        assert json.loads((found / "summary.json").read_text()) == json.loads((expected / "summary.json").read_text())
    for file in files:
        assert _tensors(found / file) == _tensors(expected / file), file
    assert json.loads((found / "complete.json").read_text()) == json.loads((expected / "complete.json").read_text())
    if stage == "pretrain":
        final = "model/model.safetensors"
        assert _tensors(folder / final) == _tensors(whole / final)
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]


def _kill_at_random(recipe: Recipe, *, stage: Stage) -> int:
    """Start and kill the run a few times; how many kills came before the end."""
    draw = random.Random(stage)
    kills = 0
    # The earliest first: a run that ends before its kill leaves nothing to kill for those that follow.
    for delay in sorted(draw.uniform(0.1, 1.5) for _ in range(5)):
        moment = time.monotonic() + delay
        process = _start(recipe, stages=(stage,))
        kills += _kill_when(process, lambda moment=moment: time.monotonic() >= moment)  # type: ignore[misc]
    return kills


def test_mask_learning_killed_at_random_moments(pruned: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = _recipe(tiny_inputs, run_dir=tmp_path / "run", log_interval=3)
    assert _kill_at_random(recipe, stage="prune")
    _finish(recipe, stage="prune")
    _assert_same("prune", whole=pruned, folder=tmp_path / "run")


def test_pretraining_killed_at_random_moments(pretrained: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = _recipe(tiny_inputs, run_dir=tmp_path / "run", log_interval=3)
    for name in ("prune", "compact"):
        shutil.copytree(pretrained / name, tmp_path / "run" / name)
    assert _kill_at_random(recipe, stage="pretrain")
    _finish(recipe, stage="pretrain")
    _assert_same("pretrain", whole=pretrained, folder=tmp_path / "run")


@pytest.mark.parametrize(
    "sign",
    [
        ".writing-step-*",
        ".writing-step-*/shard-00000-of-00001.safetensors",
        ".writing-step-*/manifest.json",
        ".removing-step-*",
    ],
)
def test_kills_inside_a_checkpoint(sign: str, pruned: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = _recipe(tiny_inputs, run_dir=tmp_path / "run")
    checkpoints = RunDirectory(tmp_path / "run").checkpoints("prune")
    for _ in range(2):
        _kill_when(_start(recipe, stages=("prune",)), lambda: any(checkpoints.glob(sign)))
    _finish(recipe, stage="prune")
    _assert_same("prune", whole=pruned, folder=tmp_path / "run")


def _half_of_the_second_checkpoint(recipe: Recipe) -> None:
    """Train, with a disk that takes half of a file and then nothing for a long time."""
    from shearing.training.checkpoints.pieces import StagedPieces

    write = StagedPieces.write

    def stuck(staged: StagedPieces, path: Path) -> dict[str, int]:
        if "step-00000004" in str(path):
            path.write_bytes(b"half")
            time.sleep(SECONDS)
        return write(staged, path)

    StagedPieces.write = stuck  # type: ignore[method-assign]
    run(recipe, stages=("prune",))


def test_a_kill_while_a_checkpoint_is_written_beside_training(pruned: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = _recipe(tiny_inputs, run_dir=tmp_path / "run")
    prune = RunDirectory(tmp_path / "run").prune
    process = PROCESSES.Process(target=_half_of_the_second_checkpoint, args=(recipe,))
    process.start()
    half, metrics = prune / "checkpoints" / ".writing-step-00000004", prune / "metrics.jsonl"
    # Step 5 is trained meanwhile; the checkpoint of step 6 would wait for that of step 4.
    assert _kill_when(process, lambda: any(half.glob("shard-*")) and '"step": 5' in metrics.read_text())
    assert (prune / "checkpoints" / "latest").read_text().strip() == "step-00000002"
    _finish(recipe, stage="prune")
    _assert_same("prune", whole=pruned, folder=tmp_path / "run")


def test_lines_after_the_checkpoint_and_half_a_line_are_dropped(
    pruned: Path, tiny_inputs: Path, tmp_path: Path
) -> None:
    recipe = _recipe(tiny_inputs, run_dir=tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    newest = directory.checkpoints("prune") / "step-00000004"
    assert _kill_when(_start(recipe, stages=("prune",)), newest.exists)
    with directory.metrics("prune").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    _finish(recipe, stage="prune")
    _assert_same("prune", whole=pruned, folder=tmp_path / "run")


def test_damaged_newest_checkpoint_costs_only_its_steps(pruned: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = _recipe(tiny_inputs, run_dir=tmp_path / "run")
    checkpoints = RunDirectory(tmp_path / "run").checkpoints("prune")
    assert _kill_when(_start(recipe, stages=("prune",)), (checkpoints / "step-00000006").exists)
    newest = max(checkpoints.glob("step-*"))
    weights = newest / "shard-00000-of-00001.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    weights.write_bytes(damaged)
    _finish(recipe, stage="prune")
    _assert_same("prune", whole=pruned, folder=tmp_path / "run")


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"lora": {"rank": 2, "dropout": 0.1}},
        {"speft": {"share": 0.1, "samples": 2}, "ist": {"interval": "3 steps", "pairs": 1, "tokens": 64}},
        {"ast": {"interval": "1 steps", "decay": 0.2, "ramp": "3 steps", "freeze": "2 steps"}},
    ],
    ids=["all weights", "adapters", "salient weights of some layers", "masks that move"],
)
def test_training_of_a_sparse_model_killed_at_its_checkpoints(
    way: dict[str, Any], tiny_inputs: Path, tmp_path: Path
) -> None:
    if "lora" in way:
        pytest.importorskip("peft")
    whole = _sparse_recipe(tiny_inputs, run_dir=tmp_path / "whole", way=way)
    _finish_all(whole, stages=SPARSE)
    recipe = _sparse_recipe(tiny_inputs, run_dir=tmp_path / "run", way=way)
    directory, kills = RunDirectory(tmp_path / "run"), 0
    for step in (2, 6):
        newest = directory.checkpoints("pretrain") / f"step-{step:08d}"
        kills += _kill_when(_start(recipe, stages=SPARSE), newest.exists)
    assert kills
    _finish_all(recipe, stages=SPARSE)
    _assert_same("pretrain", whole=tmp_path / "whole", folder=tmp_path / "run")
    for name in ("masks.packed", "model.safetensors"):
        assert (directory.model / name).read_bytes() == (tmp_path / "whole" / "model" / name).read_bytes()
    assert differences(directory.model) == []


def test_a_family_killed_at_its_checkpoints(pretrained: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    def recipe(run_dir: Path) -> Recipe:
        data = _recipe(tiny_inputs, run_dir=run_dir).model_dump(mode="json")
        data["family"] = {"sizes": {"small": {"intermediate_size": 16}}, "draws": 2, "calibration_tokens": 64}
        return Recipe.model_validate(data)

    for name in ("whole", "run"):
        for stage in ("prune", "compact"):
            shutil.copytree(pretrained / stage, tmp_path / name / stage)
    _finish(recipe(tmp_path / "whole"), stage="pretrain")
    directory, kills = RunDirectory(tmp_path / "run"), 0
    for step in (2, 6):
        newest = directory.checkpoints("pretrain") / f"step-{step:08d}"
        kills += _kill_when(_start(recipe(directory.path), stages=("pretrain",)), newest.exists)
    assert kills
    _finish(recipe(directory.path), stage="pretrain")
    _assert_same("pretrain", whole=tmp_path / "whole", folder=directory.path)
    small = Path("family") / "small" / "model.safetensors"
    assert _tensors(directory.path / small) == _tensors(tmp_path / "whole" / small)


def test_termination_finishes_the_step_and_the_same_command_continues(
    pruned: Path, tiny_inputs: Path, tmp_path: Path
) -> None:
    recipe = _recipe(tiny_inputs, run_dir=tmp_path / "run")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-m", "shearing", "prune", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + SECONDS
    metrics = RunDirectory(tmp_path / "run").metrics("prune")
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == INTERRUPTED_EXIT_CODE, output
    assert "the same command continues" in output
    stopped_at = max((tmp_path / "run" / "prune" / "checkpoints").glob("step-*"))
    assert stopped_at.name < f"step-{STEPS:08d}"
    _finish(recipe, stage="prune")
    _assert_same("prune", whole=pruned, folder=tmp_path / "run")
