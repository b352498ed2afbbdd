"""Checkpoints: when one is written, what its state holds, and how it is restored."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from shearing.files.durable import read_json
from shearing.processes.processes import Question
from shearing.training.checkpoints.checkpoints import FINGERPRINTS, Checkpoints
from shearing.training.checkpoints.fingerprints import Fingerprints
from shearing.training.checkpoints.state import (
    on_host,
    random_states,
    read_state,
    seed_random,
    set_random_states,
    write_state,
)
from shearing.training.engines.held_state import StagedShard
from shearing.training.task import Callback, Run, StepResult, Task, Unfinished

_STATE = (
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
)
"""What a state file holds, in its order; behind it, under `callbacks`, what a task's own callbacks keep, and under
`unfinished` what a stop has left to do of the step, or the stage's end, should it come later after all."""


class SaveCheckpoints(Callback):
    """Writes a checkpoint every few steps, before the decay of wsd, at the last step, and when the run stops.

    And where the last one is about to be too old: the main process's clock decides, and tells the others when metrics
    are read anyway.

    Where it may be written in the background, the loop waits for the copy in host memory alone. The checkpoint is there
    once all processes have heard, at a later step, that each has written its part; before the next one is begun; or at
    the stage's end.

    Attributes:
        unfinished: what a stop has left to do of the step that was restored; None: nothing.
    """

    acts_on_stop: ClassVar[bool] = True

    def __init__(self, task: Task) -> None:
        self._task = task
        self._files: Checkpoints
        self.unfinished: Unfinished | None = None
        self._saved = self._asked = time.monotonic()
        self._due = self._under_way = False
        self._unwritten = Question(task.processes)

    @override
    def open(self) -> None:
        """Clear away what an interrupted write left."""
        schedule = self._task.schedule
        self._files = Checkpoints(
            self._task.checkpoints,
            keep_last=schedule.keep_last,
            keep_every=schedule.keep_every,
            keep=self._task.optimization.rates.stable_steps,
            processes=self._task.processes,
        )

    @override
    def start(self, run: Run) -> None:
        """From here on work can be lost; a stage of no steps is saved, as its start is what it leaves."""
        self._saved = self._asked = time.monotonic()
        if run.ends and not run.step and self.newest() is None:
            self.save(run)

    @override
    def after_step(self, run: Run, result: StepResult) -> None:
        """Save if it is time to, and put into place what has been written."""
        schedule = run.task.schedule
        stable = run.step == run.task.optimization.rates.stable_steps
        kept = schedule.keep_every is not None and run.step % schedule.keep_every == 0
        due = stable or kept or self._due or run.step % schedule.checkpoint_interval == 0
        if run.ends or run.stopping:
            self.save(run)
        elif due:
            self._begin(run, background=schedule.background_checkpoints)
        elif self._under_way and self._is_written():
            self._finish(run)

    @override
    def tell(self) -> bool:
        """Whether a checkpoint is due: the last would be too old if it waited as long again as since the last time."""
        now, most = time.monotonic(), self._task.schedule.checkpoint_seconds
        since, self._asked = now - self._asked, now
        return most is not None and now - self._saved + since > most

    @override
    def hear(self, run: Run, told: Sequence[bool]) -> None:
        """All go by the main process's clock."""
        self._due = told[0]

    @override
    def end(self, run: Run) -> None:
        """The stage waits for the last one."""
        self._finish(run)

    @override
    def close(self) -> None:
        """Leave no thread behind; what it was writing is no checkpoint unless the stage has put it into place."""
        if self._under_way:
            self._files.abandon()

    def save(self, run: Run) -> None:
        """Write a checkpoint of the steps done, and wait for it."""
        self._begin(run, background=False)

    def _begin(self, run: Run, *, background: bool) -> None:
        self._finish(run)
        run.report()
        state = on_host(self._state(run))
        shard = run.task.processes.each(partial(run.task.engine.stage, copied=background))
        self._files.begin(step=run.step, write=partial(self._write, shard, state), background=background)
        self._saved, self._due, self._under_way = time.monotonic(), False, True
        if not background:
            self._finish(run)

    def _is_written(self) -> bool:
        """Whether all processes had written their parts at the step before."""
        # The largest answer is of the slowest; that to no question is none.
        return self._unwritten.ask(1 if self._files.is_written else 2) == 1

    def _finish(self, run: Run) -> None:
        """Put into place what is under way, if anything is."""
        if not self._under_way:
            return
        self._unwritten.answer()
        self._under_way = False
        folder = self._files.finish()
        for callback in run.callbacks:
            callback.after_save(run, folder)

    def newest(self) -> Path | None:
        """Folder of the newest checkpoint that is undamaged, None if there is none."""
        return self._files.newest()

    def last(self) -> Path:
        """Folder of the checkpoint of the final step."""
        return self._files.place(self._task.schedule.total_steps)

    def restore(self, folder: Path, *, callbacks: Sequence[Callback]) -> int:
        """Bring the prepared engine, samples, masks, callbacks and random generators to where a checkpoint was taken.

        Args:
            folder: the checkpoint.
            callbacks: all of the run.

        Returns:
            Optimiser steps done.
        """
        task, state = self._task, read_state(folder, "state")
        task.engine.load(folder, saved=read_json(folder / FINGERPRINTS))
        task.mixture.load_state_dict(state["mixture"])
        if task.masking is not None:
            task.masking.load_state_dict(state["masks"])
        others: Mapping[str, Any] = state.get("callbacks", {})
        for callback in callbacks:
            if not self._is_others(callback):
                callback.load_state_dict(state)
            elif callback.name in others:
                callback.load_state_dict(others[callback.name])
        # Of more processes than wrote it, those to come draw a seed of their own where others were.
        # A checkpoint of a version that kept the main process's alone has no list.
        states = state["random"] if isinstance(state["random"], list) else [state["random"]]
        rank = task.processes.rank
        set_random_states(states[rank % len(states)])
        if rank >= len(states):
            seed_random(int(torch.randint(2**31, ())) + rank)
        if (left := state.get("unfinished")) is not None:
            self.unfinished = Unfinished(**left)
        step: int = state["step"]
        return step

    def _state(self, run: Run) -> dict[str, Any]:
        task = run.task
        state: dict[str, Any] = {
            "step": run.step,
            "mixture": run.prefetcher.state_dict(),
            "masks": None if task.masking is None else task.masking.state_dict(),
        }
        others: dict[str, dict[str, Any]] = {}
        for callback in run.callbacks:
            kept = callback.state_dict()
            if not self._is_others(callback):
                state |= kept
            elif kept:
                others[callback.name] = kept
        state["random"] = task.processes.gather(random_states())
        ordered = {key: state.pop(key) for key in _STATE}
        assert not state, f"no place in a checkpoint: {sorted(state)}"
        unfinished = None if (left := _left(run)) is None else asdict(left)
        return {
            **ordered,
            **({"callbacks": others} if others else {}),
            **({"unfinished": unfinished} if unfinished else {}),
        }

    def _is_others(self, callback: Callback) -> bool:
        """Whether it is one of the task's own, whose state has a place of its own."""
        return any(callback is each for each in self._task.callbacks)

    def _write(self, shard: StagedShard, state: dict[str, Any], folder: Path) -> Fingerprints:
        marks = shard.write_into(folder)
        if self._task.processes.is_main:
            write_state(folder, "state", state)
        return marks


def _left(run: Run) -> Unfinished | None:
    """What is left to do of the last step, with what only a longer stage would do; None: nothing."""
    left = run.unfinished or Unfinished(callbacks=(), skipped=False)
    names = tuple(callback.name for callback in run.callbacks if callback.left_out)
    return Unfinished(callbacks=(*names, *left.callbacks), skipped=left.skipped) if names else run.unfinished


def left_in(checkpoint: Path) -> Sequence[str]:
    """Names of the callbacks that are told of the step's end where a checkpoint is continued."""
    left: Mapping[str, Any] = read_state(checkpoint, "state").get("unfinished") or {"callbacks": ()}
    return tuple(left["callbacks"])
