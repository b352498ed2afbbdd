"""Callbacks: what a task adds of its own is told everything in order, saved, and continued bit for bit."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from shearing.errors import ShearingError
from shearing.models.masked import MaskedModel, Masks
from shearing.pruning.structured.masking import Masking
from shearing.training.callbacks.heldout_at_end import measure_held_out
from shearing.training.callbacks.non_finite import NonFiniteGuard
from shearing.training.callbacks.stop_requests import StopRequests
from shearing.training.checkpoints.state import read_state
from shearing.training.loop import train
from shearing.training.metrics import TIMING_FIELDS
from shearing.training.stage import Interrupted
from shearing.training.task import Callback, Run, StepResult
from tests.training import tasks

KEYS = [
    "step",
    "skipped",
    "skipped_in_row",
    "metrics_bytes",
    "mixture",
    "mixture_rule",
    "masks",
    "averages",
    "objective",
    "random",
]


class Measured(Callback):
    """Sizes of the masks under which each step's held-out losses are measured."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sizes: list[tuple[dict[str, int], dict[str, float]]] = []
        self._masks = Masks()
        set_masks = MaskedModel.set_masks

        def spied(model: MaskedModel, masks: Masks | None) -> None:
            self._masks = masks or Masks()
            set_masks(model, masks)

        patch.setattr(MaskedModel, "set_masks", spied)

    def _note(self, run: Run) -> None:
        assert isinstance(run.task.masking, Masking)
        masks = {"layers": self._masks.attention, **self._masks.tensors()}
        sizes = {}
        for name in ("layers", "hidden", "intermediate"):
            mask = masks[name]
            assert mask is not None
            [sizes[name]] = {int(count) for count in mask.sum(-1).flatten()}
        self.sizes.append((sizes, run.task.masking.learner.targets(step=run.step)))

    def after_step(self, run: Run, result: StepResult) -> None:
        run.report()
        measure_held_out(run, run.task.heldout, name="held-out losses")
        self._note(run)

    def end(self, run: Run) -> None:
        measure_held_out(run, run.task.heldout, name="held-out losses")
        self._note(run)


class Evaluation(Callback):
    """Held-out losses every few steps, with a running mean that is its state: as a file of its own would add it."""

    def __init__(self, *, every: int) -> None:
        self.every, self.count, self.mean = every, 0, torch.zeros((), dtype=torch.float64)

    def after_step(self, run: Run, result: StepResult) -> None:
        if run.step % self.every:
            return
        run.report()
        loss = measure_held_out(run, run.task.heldout, name="evaluation")["letters"]
        self.count += 1
        self.mean = self.mean + (loss - self.mean) / self.count
        line = {"step": run.step, "event": "evaluation", "losses": {"letters": loss}, "mean": float(self.mean)}
        run.log(line)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.mean = state["count"], state["mean"]


class Drift(Callback):
    """Moves the weights behind every step, otherwise where it was skipped."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def after_step(self, run: Run, result: StepResult) -> None:
        self.steps.append(run.step)
        with torch.no_grad():
            for weight in run.model.parameters():
                weight.mul_(torch.where(result.skipped, 1.0, 1.0 + 0.01 * run.step))


class Listener(Callback):
    """Writes down what it is told, with the step."""

    def __init__(self, *, stop_at: int | None = None) -> None:
        self.heard: list[tuple[str, int]] = []
        self.stop_at = stop_at

    def open(self) -> None:
        self.heard.append(("open", -1))

    def start(self, run: Run) -> None:
        self.heard.append(("start", run.step))

    def before_step(self, run: Run) -> None:
        self.heard.append(("before_step", run.step))

    def after_step(self, run: Run, result: StepResult) -> None:
        self.heard.append(("after_step", run.step))
        if run.step == self.stop_at:
            run.stopping = "enough"

    def report(self, run: Run) -> None:
        self.heard.append(("report", run.step))

    def log(self, run: Run, line: Mapping[str, Any]) -> None:
        self.heard.append((f"log {line.get('event', 'step')}", line["step"]))

    def tell(self) -> str:
        return "here"

    def hear(self, run: Run, told: Any) -> None:
        assert told == ["here"]
        self.heard.append(("hear", run.step))

    def after_save(self, run: Run, folder: Path) -> None:
        assert (folder / "manifest.json").is_file()
        self.heard.append(("after_save", run.step))

    def end(self, run: Run) -> None:
        self.heard.append(("end", run.step))

    def close(self) -> None:
        self.heard.append(("close", -1))


def _train(inputs: Path, folder: Path, *callbacks: Callback, **changes: Any) -> None:
    task = tasks.tiny_task(inputs, folder, callbacks=callbacks, **changes)
    train(task, console=Console(file=io.StringIO()), measure_end=True)


def _lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


def _state(folder: Path) -> str:
    text = (folder / "checkpoints" / f"step-{tasks.STEPS:08d}" / "state.json").read_text()
    return re.sub(r'\["metrics_bytes", \d+\]', "", text)


def test_a_callback_of_a_task_is_saved_and_continued_bit_for_bit(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts, without = (tmp_path / name for name in ("whole", "parts", "without"))
    _train(tiny_inputs, whole, Evaluation(every=2))
    with monkeypatch.context() as patch:
        tasks.stop_at(5, patch=patch)
        with pytest.raises(Interrupted):
            _train(tiny_inputs, parts, Evaluation(every=2))
    assert read_state(parts / "checkpoints" / "step-00000005", "state")["callbacks"]["Evaluation"]["count"] == 2
    continued = Evaluation(every=2)
    _train(tiny_inputs, parts, continued)
    assert continued.count == tasks.STEPS // 2
    assert _lines(parts) == _lines(whole)
    assert [line["step"] for line in _lines(whole) if line.get("event") == "evaluation"] == [2, 4, 6, 8]
    assert _state(parts) == _state(whole)
    last = Path("checkpoints") / f"step-{tasks.STEPS:08d}"
    for name in ("state.safetensors", "shard-00000-of-00001.safetensors"):
        assert (parts / last / name).read_bytes() == (whole / last / name).read_bytes()
    # Looking at the model leaves no trace in the run.
    _train(tiny_inputs, without)
    assert _lines(without) == [line for line in _lines(whole) if line.get("event") != "evaluation"]
    shard = last / "shard-00000-of-00001.safetensors"
    assert (without / shard).read_bytes() == (whole / shard).read_bytes()


def test_what_a_stop_leaves_to_do_of_a_step_is_done_where_the_run_continues(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _train(tiny_inputs, whole, Evaluation(every=2), Drift())
    heed = StopRequests.heed

    def signalled(requests: StopRequests) -> None:
        requests.requested = "SIGTERM"
        heed(requests)

    stopped = Evaluation(every=2), Drift()
    with monkeypatch.context() as patch:
        patch.setattr(StopRequests, "heed", signalled)
        with pytest.raises(Interrupted):
            _train(tiny_inputs, parts, *stopped)
        assert stopped[0].count == 0
        assert stopped[1].steps == [1]
        kept = read_state(parts / "checkpoints" / "step-00000002", "state")
        assert list(kept) == [*KEYS, "callbacks", "unfinished"]
        assert kept["unfinished"] == {"callbacks": ("Evaluation", "Drift"), "skipped": False}
        with pytest.raises(Interrupted):  # nothing is lost where it is asked again
            _train(tiny_inputs, parts, Evaluation(every=2), Drift())
    again = Drift()
    _train(tiny_inputs, parts, Evaluation(every=2), again)
    assert again.steps == list(range(2, tasks.STEPS + 1))
    assert _lines(parts) == _lines(whole)
    last = Path("checkpoints") / f"step-{tasks.STEPS:08d}"
    for name in ("state.safetensors", "shard-00000-of-00001.safetensors"):
        assert (parts / last / name).read_bytes() == (whole / last / name).read_bytes()
    assert _state(parts) == _state(whole)


def test_state_has_its_keys_in_order_and_callbacks_behind_them_only_where_one_keeps_something(
    tiny_inputs: Path, tmp_path: Path
) -> None:
    last = Path("checkpoints") / f"step-{tasks.STEPS:08d}"
    _train(tiny_inputs, tmp_path / "plain", Listener())
    _train(tiny_inputs, tmp_path / "keeping", Evaluation(every=3), Listener())
    assert list(read_state(tmp_path / "plain" / last, "state")) == KEYS
    kept = read_state(tmp_path / "keeping" / last, "state")
    assert list(kept) == [*KEYS, "callbacks"]
    assert list(kept["callbacks"]) == ["Evaluation"]


def test_a_checkpoint_without_a_callbacks_state_is_continued_with_it(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        tasks.stop_at(3, patch=patch)
        with pytest.raises(Interrupted):
            _train(tiny_inputs, tmp_path)
    late = Evaluation(every=2)
    _train(tiny_inputs, tmp_path, late)
    assert late.count == 3


def test_hooks_come_in_order(tiny_inputs: Path, tmp_path: Path) -> None:
    listener = Listener()
    # In the background, a checkpoint is there as soon as the disk has it.
    _train(tiny_inputs, tmp_path, listener, checkpoint_interval=4, training={"checkpoint_writing": "foreground"})
    expected = [("open", -1), ("start", 0)]
    for step in range(1, tasks.STEPS + 1):
        expected.append(("before_step", step - 1))
        unread = {3: (1, 2, 3), 4: (4,), 6: (5, 6), 8: (7, 8)}.get(step, ())
        read = [("hear", step), *(("log step", each) for each in unread), ("report", step)]
        if step in (3, 6, 8):  # read every third step, and at the end
            expected += read
        expected.append(("after_step", step))
        if step == 4:
            expected += [*read, ("after_save", step)]
        if step == 8:  # asked for once more, though there is nothing left to read
            expected += [("report", step), ("after_save", step)]
    assert listener.heard == [*expected, ("end", tasks.STEPS), ("close", -1)]


def test_a_callback_may_stop_the_run_with_a_checkpoint(tiny_inputs: Path, tmp_path: Path) -> None:
    listener = Listener(stop_at=3)
    with pytest.raises(Interrupted):
        _train(tiny_inputs, tmp_path, listener)
    assert listener.heard[-2:] == [("after_save", 3), ("close", -1)]
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()


def test_all_that_was_opened_is_closed_when_the_start_fails(tiny_inputs: Path, tmp_path: Path) -> None:
    class Broken(Listener):
        def start(self, run: Run) -> None:
            raise RuntimeError("broken")

    listener, broken = Listener(), Broken()
    with pytest.raises(RuntimeError, match="broken"):
        _train(tiny_inputs, tmp_path, listener, broken)
    assert listener.heard == [("open", -1), ("start", 0), ("close", -1)]
    assert broken.heard == [("open", -1), ("close", -1)]


def test_two_callbacks_of_one_name_are_refused(tiny_inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Listener"):
        tasks.tiny_task(tiny_inputs, tmp_path, callbacks=(Listener(), Listener()))


def test_skipped_steps_in_a_row_are_counted_over_reports_and_resumes(tiny_inputs: Path, tmp_path: Path) -> None:
    saved: list[Run] = []
    guard = NonFiniteGuard(most=3, save=saved.append)
    task = tasks.tiny_task(tiny_inputs, tmp_path)
    run: Any = type("AnyRun", (), {"task": task, "step": 9, "ends": False})()
    for skipped in (0, 1, 2, 2, 3):  # two in a row, a good one, one more
        guard.log(run, {"skipped": skipped})
    guard.log(run, {"event": "mixture"})
    guard.report(run)
    assert guard.state_dict() == {"skipped_in_row": 1}
    later = NonFiniteGuard(most=3, save=saved.append)
    later.load_state_dict({"skipped": 3, "skipped_in_row": 1})
    for skipped in (4, 5, 5):
        later.log(run, {"skipped": skipped})
    later.report(run)
    assert saved == []  # the step is not over
    result: Any = None
    with pytest.raises(ShearingError, match=r"not finite in 3 steps in a row[\s\S]*tries the steps that follow"):
        later.after_step(run, result)
    assert saved == [run]
    assert later.state_dict() == {"skipped_in_row": 0}
    later.after_step(run, result)
    # Behind the last step the last checkpoint is there already, and nothing follows.
    for skipped in (6, 7, 8):
        later.log(run, {"skipped": skipped})
    later.report(run)
    run.ends = True
    later.after_step(run, result)
    with pytest.raises(ShearingError, match=r"not finite in 3 steps in a row[\s\S]*ends the stage"):
        later.end(run)
    assert saved == [run]


def test_a_signal_behind_the_last_step_is_heard(tiny_inputs: Path, tmp_path: Path) -> None:
    class Late(Listener):
        def end(self, run: Run) -> None:
            super().end(run)
            os.kill(os.getpid(), signal.SIGUSR1)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    _train(tiny_inputs, whole)
    with pytest.raises(Interrupted):
        _train(tiny_inputs, stopped, Late())
    again = Listener()
    _train(tiny_inputs, stopped, again)
    assert again.heard == [("open", -1), ("start", tasks.STEPS), ("end", tasks.STEPS), ("close", -1)]
    assert _lines(stopped) == _lines(whole)
    assert _state(stopped) == _state(whole)


def test_losses_on_the_way_are_of_the_size_of_their_step(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch)
    train(tasks.tiny_task(tiny_inputs, tmp_path, callbacks=(measured,)), console=Console(file=io.StringIO()))
    assert len(measured.sizes) == tasks.STEPS + 1
    for sizes, targets in measured.sizes:
        assert sizes == {name: round(targets[name]) for name in sizes}
    hidden = [sizes["hidden"] for sizes, _ in measured.sizes]
    assert hidden[0] > hidden[1] > hidden[2] == hidden[-1] == 16
