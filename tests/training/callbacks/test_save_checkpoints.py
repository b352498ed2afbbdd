"""When a checkpoint is written: by steps, and where the last one is about to be too old."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from shearing.training.callbacks import save_checkpoints
from shearing.training.callbacks.save_checkpoints import SaveCheckpoints
from shearing.training.loop import train
from shearing.training.task import Callback, Run
from tests.training import tasks

BY_STEPS = 100
"""Steps between two checkpoints, more than there are; metrics are read every third step."""


class Clock(Callback):
    """A step takes 100 seconds."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1e6
        patch.setattr(save_checkpoints, "time", SimpleNamespace(monotonic=lambda: self.now))

    def before_step(self, run: Run) -> None:
        self.now += 100


class Saved(Callback):
    """Steps of the checkpoints."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def after_save(self, run: Run, folder: Path) -> None:
        self.steps.append(int(folder.name.removeprefix("step-")))


def _saved(inputs: Path, folder: Path, *, patch: pytest.MonkeyPatch, **changes: Any) -> list[int]:
    saved = Saved()
    task = tasks.tiny_task(inputs, folder, callbacks=(Clock(patch), saved), **changes)
    train(task, console=Console(file=io.StringIO()))
    return saved.steps


def test_a_checkpoint_is_due_before_the_last_one_is_too_old(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saved(name: str, minutes: float | None) -> list[int]:
        given = {"checkpoint_interval": BY_STEPS, "checkpoint_minutes": minutes}
        return _saved(tiny_inputs, tmp_path / name, patch=monkeypatch, **given)

    assert saved("by steps", None) == [8]
    assert saved("seldom", 30.0) == [8]
    # Read at steps 3 and 6: at 3 the next look comes at 600 seconds, in time; at 6 it would come at 900.
    assert saved("sometimes", 10.0) == [6, 8]
    assert saved("often", 5.0) == [3, 6, 8]
    last = Path("checkpoints") / f"step-{tasks.STEPS:08d}" / "shard-00000-of-00001.safetensors"
    weights = {(tmp_path / name / last).read_bytes() for name in ("by steps", "seldom", "sometimes", "often")}
    assert len(weights) == 1, "when checkpoints are written changes nothing in them"


def test_checkpoints_by_steps_count_too(tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"checkpoint_interval": 2, "checkpoint_minutes": 10.0}
    assert _saved(tiny_inputs, tmp_path, patch=monkeypatch, **given) == [2, 4, 6, 8]


def test_what_is_kept_for_good_is_written_whatever_the_interval(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"checkpoint_interval": 5, "checkpoint_minutes": None, "keep_every": 3, "keep_last": 1}
    assert _saved(tiny_inputs, tmp_path, patch=monkeypatch, **given) == [3, 5, 6, 8]
    kept = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == [3, 6, 8]


def test_all_processes_go_by_the_clock_of_the_main_one(tiny_inputs: Path, tmp_path: Path) -> None:
    class Written(SaveCheckpoints):
        def _begin(self, run: Run, *, background: bool) -> None:
            written.append(run.step)

    written: list[int] = []
    task = tasks.tiny_task(tiny_inputs, tmp_path, checkpoint_interval=BY_STEPS)
    run: Any = SimpleNamespace(step=1, ends=False, stopping=None, task=task)
    callback = Written(task)
    for told in ([False, True], [True, False]):
        callback.hear(run, told)
        callback.after_step(run, SimpleNamespace())
        run.step += 1
    assert written == [2]
