"""Runs of several processes that are killed or stopped, and continued: on as many processes, and on others."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shearing.runs.run_directory import RunDirectory
from shearing.training.checkpoints.state import read_state
from shearing.training.stage import INTERRUPTED_EXIT_CODE
from tests.distributed import runs
from tests.distributed.harness import Group, spawn, start

pytestmark = pytest.mark.slow
STEPS = 12
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "torch, 2 processes": (2, {}),
    "torch, 4 processes": (4, {}),
    "ZeRO-2, 2 processes": (2, {"engine": "deepspeed", "zero_stage": 2}),
    "ZeRO-3, 4 processes": (4, {"engine": "deepspeed", "zero_stage": 3}),
    "FSDP2, 2 processes": (2, {"engine": "fsdp2"}),
    "torch, 2 processes, listening": (2, {"listening": True}),
    "ZeRO-2, 2 processes, listening": (2, {"engine": "deepspeed", "zero_stage": 2, "listening": True}),
}


@pytest.fixture(scope="module")
def uninterrupted(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run directory of a run of the named engine that nothing interrupted."""
    done: dict[str, Path] = {}

    def run_dir(name: str) -> Path:
        if name not in done:
            size, settings = ENGINES[name]
            folder = tmp_path_factory.mktemp("whole")
            recipe = runs.recipe(tiny_inputs, run_dir=folder / "run", steps=STEPS, **settings)
            spawn(runs.train, recipe, ("prune",), size=size, folder=folder / "out")
            done[name] = folder / "run"
        return done[name]

    return run_dir


def _recipe(inputs: Path, tmp_path: Path, name: str) -> tuple[int, Any]:
    size, settings = ENGINES[name]
    return size, runs.recipe(inputs, run_dir=tmp_path / "run", steps=STEPS, **settings)


def _when(group: Group, condition: Callable[[], bool]) -> bool:
    """Wait until `condition` holds; False where a process ended before."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(process.exitcode is not None for process in group.processes):
            return False
        if condition():
            return True
        time.sleep(0.001)
    return False


def _steps(run_dir: Path) -> int:
    path = run_dir / "prune" / "metrics.jsonl"
    return path.read_text().count('"grad_norm"') if path.exists() else 0


def _written(run_dir: Path) -> int:
    """When the last step was written, so that what an earlier process left does not count."""
    path = run_dir / "prune" / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def _is_at(run_dir: Path, *, steps: int, there: str | None, since: int) -> bool:
    """Whether a run has written steps since then, so many in all, and has such a file among its checkpoints."""
    found = there is None or any(RunDirectory(run_dir).checkpoints("prune").glob(there))
    return found and _written(run_dir) > since and _steps(run_dir) >= steps


def _assert_bit_for_bit(found: Path, expected: Path) -> None:
    ours, theirs = dict(runs.contents(found, "prune")), dict(runs.contents(expected, "prune"))
    assert ours.keys() == theirs.keys()
    assert [line["step"] for line in ours["metrics"] if "event" not in line] == list(range(1, STEPS + 1))
    for name, content in ours.items():
        assert content == theirs[name], name


@pytest.mark.parametrize(
    ("name", "victims"),
    [
        ("torch, 2 processes", "one"),
        ("torch, 4 processes", "all"),
        ("ZeRO-2, 2 processes", "one"),
        ("ZeRO-2, 2 processes", "all"),
        ("ZeRO-3, 4 processes", "one"),
        ("FSDP2, 2 processes", "one"),
    ],
)
def test_killed_and_continued_is_the_uninterrupted_run(
    name: str, victims: str, tiny_inputs: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    size, recipe = _recipe(tiny_inputs, tmp_path, name)
    run_dir, draw = tmp_path / "run", random.Random(f"{name} {victims}")
    for attempt in range(3):
        before = _written(run_dir)
        group = start(runs.train, recipe, ("prune",), size=size, folder=tmp_path / f"out-{attempt}")
        step = draw.randrange(2, STEPS - 1)
        # The second inside a checkpoint, and not one that the first kill left; the last has one to go on from.
        steps, there = [(step, None), (1, ".writing-*/*"), (step, "step-*")][attempt]
        reached = _when(group, partial(_is_at, run_dir, steps=steps, there=there, since=before))
        chosen = group.processes if victims == "all" else [draw.choice(group.processes)]
        for process in chosen:
            process.kill()
        codes = group.wait(seconds=90)
        assert not reached or all(codes), f"a process ended well though others were killed: {codes}\n{group.said()}"
    spawn(runs.train, recipe, ("prune",), size=size, folder=tmp_path / "out")
    assert not reached or "continuing prune from step" in (tmp_path / "out" / "output-0.txt").read_text()
    _assert_bit_for_bit(run_dir, uninterrupted(name))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("torch, 2 processes, listening", (1, {})),
        ("ZeRO-2, 2 processes, listening", (4, {})),
    ],
    ids=["torch on 2, then on 1", "ZeRO-2 on 2, then torch on 4"],
)
def test_a_run_that_listens_is_killed_and_continued(
    name: str,
    other: tuple[int, dict[str, Any]],
    tiny_inputs: Path,
    tmp_path: Path,
    uninterrupted: Callable[[str], Path],
) -> None:
    """The teacher is loaded anew; its trust, and its losses since the last update, are in the checkpoint."""
    size, recipe = _recipe(tiny_inputs, tmp_path, name)
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    group = start(runs.train, recipe, ("prune",), size=size, folder=tmp_path / "out-killed")
    first = RunDirectory(run_dir).checkpoints("prune") / "step-00000004"
    assert _when(group, first.is_dir)  # written in the background: a step or more after the fourth
    group.processes[1].kill()
    assert all(group.wait(seconds=90)), group.said()
    assert _steps(run_dir) < STEPS
    assert read_state(first, "state")["averages"], "there are losses since the last update"
    shutil.copytree(run_dir, elsewhere / "run")
    spawn(runs.train, recipe, ("prune",), size=size, folder=tmp_path / "out")
    assert "continuing prune from step" in (tmp_path / "out" / "output-0.txt").read_text()
    expected = uninterrupted(name)
    _assert_bit_for_bit(run_dir, expected)
    trust = {str(line.get("domain_teacher_weights")) for line in runs.lines(run_dir, "prune") if "event" not in line}
    assert len(trust) > STEPS // 2, "trust moves"

    size, settings = other
    recipe = runs.recipe(tiny_inputs, run_dir=elsewhere / "run", steps=STEPS, listening=True, **settings)
    spawn(runs.train, recipe, ("prune",), size=size, folder=elsewhere / "out")
    ours, theirs = (runs.trajectory(folder, "prune", listening=True) for folder in (elsewhere / "run", expected))
    assert runs.difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_all_in_order(
    number: signal.Signals, tiny_inputs: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    size, recipe = _recipe(tiny_inputs, tmp_path, "torch, 2 processes")
    group = start(runs.train, recipe, ("prune",), size=size, folder=tmp_path / "out")
    assert _when(group, lambda: _steps(tmp_path / "run") >= 3)
    pid = group.processes[1].pid
    assert pid is not None
    os.kill(pid, number)
    assert group.wait() == [INTERRUPTED_EXIT_CODE] * size, group.said()
    assert f"{number.name}: stopped after step" in group.said()
    done = _steps(tmp_path / "run")
    assert (RunDirectory(tmp_path / "run").checkpoints("prune") / f"step-{done:08d}").is_dir()
    spawn(runs.train, recipe, ("prune",), size=size, folder=tmp_path / "again")
    _assert_bit_for_bit(tmp_path / "run", uninterrupted("torch, 2 processes"))


@pytest.mark.parametrize("name", ["torch, 2 processes", "FSDP2, 2 processes"])
def test_a_signal_to_one_process_is_heard_between_two_batches_of_held_out_text(
    name: str, tiny_inputs: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    size, recipe = _recipe(tiny_inputs, tmp_path, name)
    # The first update (the source's losses come before it), once more where the run continues, and the end.
    for measurement in (2, 1, 4):
        group = start(_signalled_in, recipe, measurement, size=size, folder=tmp_path / f"out-{measurement}")
        assert group.wait() == [INTERRUPTED_EXIT_CODE] * size, group.said()
        assert "SIGTERM: stopped after step" in group.said()
        assert group.said().count("passed 3 of 4") == size, "all hear a batch later"
    spawn(runs.train, recipe, ("prune",), size=size, folder=tmp_path / "again")
    _assert_bit_for_bit(tmp_path / "run", uninterrupted(name))


def _signalled_in(recipe: Any, measurement: int) -> None:
    """A training run whose second process gets SIGTERM behind its second batch of a measurement."""
    from shearing.runs.stages import heldout

    heldout_loss, passed = heldout.heldout_loss, [0] * measurement

    def measured(*arguments: Any, progress: Callable[[int], None], **keywords: Any) -> Any:
        passed.append(0)

        def counted(tokens: int) -> None:
            passed[-1] += 1
            if len(passed) == 2 * measurement and passed[-1] == 2 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            progress(tokens)

        return heldout_loss(*arguments, progress=counted, **keywords)

    heldout.heldout_loss = measured
    try:
        runs.train(recipe, ("prune",))
    finally:
        print(f"passed {passed[-1]} of 4", flush=True)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, {"engine": "deepspeed", "zero_stage": 2}), (1, {})),
        ((1, {}), (2, {"engine": "deepspeed", "zero_stage": 3})),
        ((2, {"engine": "deepspeed", "zero_stage": 3}), (4, {"engine": "deepspeed", "zero_stage": 1})),
        ((4, {"engine": "deepspeed", "zero_stage": 3}), (2, {})),
        ((4, {}), (2, {"engine": "deepspeed", "zero_stage": 2, "offload_optimizer": "cpu"})),
        ((1, {}), (2, {"engine": "fsdp2"})),
        ((2, {"engine": "fsdp2"}), (1, {"engine": "fsdp2"})),
    ],
    ids=[
        "ZeRO-2 on 2 to torch on 1",
        "torch on 1 to ZeRO-3 on 2",
        "ZeRO-3 on 2 to ZeRO-1 on 4",
        "ZeRO-3 on 4 to torch on 2",
        "torch on 4 to ZeRO-2 offloaded on 2",
        "torch on 1 to FSDP2 on 2",
        "FSDP2 on 2 to FSDP2 on 1",
    ],
)
def test_continued_on_other_processes_and_stages(
    first: tuple[int, dict[str, Any]],
    second: tuple[int, dict[str, Any]],
    tiny_inputs: Path,
    tmp_path: Path,
    uninterrupted: Callable[[str], Path],
) -> None:
    run_dir = tmp_path / "run"
    size, settings = first
    group = start(
        runs.train,
        runs.recipe(tiny_inputs, run_dir=run_dir, steps=STEPS, **settings),
        ("prune",),
        size=size,
        folder=tmp_path / "first",
    )
    assert _when(group, lambda: _steps(run_dir) >= 4)
    for process in group.processes:
        process.terminate()
    assert group.wait() == [INTERRUPTED_EXIT_CODE] * size, group.said()
    assert _steps(run_dir) < STEPS
    size, settings = second
    recipe = runs.recipe(tiny_inputs, run_dir=run_dir, steps=STEPS, **settings)
    spawn(runs.train, recipe, ("prune",), size=size, folder=tmp_path / "second")
    expected = uninterrupted("torch, 2 processes")
    assert runs.difference(runs.trajectory(run_dir, "prune"), runs.trajectory(expected, "prune")) < 1e-5
    for name in ("summary.json", "complete.json"):
        ours, theirs = ((folder / "prune" / name).read_text() for folder in (run_dir, expected))
        assert _samples(ours) == _samples(theirs)


def _samples(text: str) -> Any:
    import json

    content = json.loads(text)
    return content.get("samples"), content.get("mixture_state", {}).get("dealt")


def test_an_error_on_one_process_ends_all_and_is_shown(tiny_inputs: Path, tmp_path: Path) -> None:
    _, recipe = _recipe(tiny_inputs, tmp_path, "torch, 2 processes")
    started = time.monotonic()
    group = start(_fails_on_the_last, recipe, size=2, folder=tmp_path / "out")
    codes = group.wait(seconds=60)
    assert all(codes), codes
    assert time.monotonic() - started < 60
    assert "error in process 1 of 2 on" in group.outputs[1].read_text()
    assert "the disk of process 1 is on fire" in group.outputs[1].read_text()
    assert "the disk of process 1 is on fire" in group.outputs[0].read_text()


def _fails_on_the_last(recipe: Any) -> None:
    from shearing.training import loop

    forward_backward, calls = loop._forward_backward, 0

    def failing(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if os.environ["RANK"] == "1" and calls == 4:
            raise OSError("the disk of process 1 is on fire")
        return forward_backward(*arguments, **keywords)

    loop._forward_backward = failing
    runs.train(recipe, ("prune",))


def test_too_few_sequences_for_the_processes_is_one_error(tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = runs.recipe(tiny_inputs, run_dir=tmp_path / "run", steps=STEPS)
    group = start(runs.train, recipe, ("prune",), size=3, folder=tmp_path / "out")
    codes = group.wait(seconds=60)
    assert all(codes), codes
    assert "prune.batch_size = '4 sequences'" in group.outputs[0].read_text()
    assert "3 processes" in group.outputs[0].read_text()
    assert group.outputs[1].read_text() == group.outputs[2].read_text() == ""
    assert not (tmp_path / "run").exists()


def test_a_damaged_shard_costs_only_its_steps(
    tiny_inputs: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    name = "ZeRO-2, 2 processes"
    shutil.copytree(uninterrupted(name), tmp_path / "run")
    (tmp_path / "run" / "prune" / "complete.json").unlink()
    newest = max(RunDirectory(tmp_path / "run").checkpoints("prune").glob("step-*"))
    shard = newest / "shard-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    size, recipe = _recipe(tiny_inputs, tmp_path, name)
    spawn(runs.train, recipe, ("prune",), size=size, folder=tmp_path / "out")
    assert "is damaged" in (tmp_path / "out" / "output-0.txt").read_text()
    _assert_bit_for_bit(tmp_path / "run", uninterrupted(name))
