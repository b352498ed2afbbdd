"""What a stage trains with (`Task`), the stage under way (`Run`), and what may go on around its steps (`Callback`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor, nn

from shearing.data.mixture.dynamic import DynamicMixture
from shearing.data.mixture.prefetcher import Prefetcher
from shearing.data.mixture.sampler import Mixture
from shearing.objectives.objective import Objective
from shearing.processes.processes import Processes
from shearing.processes.stop import StopAsked
from shearing.training.checkpoints.pieces import SavedState
from shearing.training.engines.engine import Engine
from shearing.training.engines.moving_masks import MovingMasks
from shearing.training.engines.optimizer import Optimization
from shearing.training.metrics import Display
from shearing.training.stage import Compute, HeldOut, MaskedTraining, Schedule
from shearing.training.trackers import Trackers


class Callback:
    """Something that goes on around the steps of a stage; every hook does nothing unless overridden.

    Hooks are called on all processes, of one callback after the other in their order: those that every stage has (see
    `callbacks.standard`), with the task's own before what may end the run, and checkpoints last. So a hook may exchange
    something with the other processes, a checkpoint holds what the step's hooks left, and a run that is killed and
    continued is the uninterrupted one, as long as what a callback does depends on the step and on its state alone.

    A hook that measures may be left by `StopAsked` between two batches. Those after a step are called again, from that
    one on, where the run continues: what they change is changed behind the measurement.

    What is on the device stays there until `Run.report`: a hook that reads from it in every step makes every step wait.
    What takes long calls `Run.report` first, so that its time does not count as the steps'.
    """

    acts_on_stop: ClassVar[bool] = False
    """Whether the end of a step is told to it also where a stop cut that short."""

    left_out: bool = False
    """Whether it did nothing at the end of the last step only because the stage ends too soon after it: where a
    checkpoint of that step is continued, it is told again."""

    @property
    def name(self) -> str:
        """What the callback's state is called in a checkpoint; no two of a task share it."""
        return type(self).__name__

    def open(self) -> None:
        """First of all, before the model is prepared."""

    def start(self, run: Run) -> None:
        """Model and state are there, restored where a checkpoint is continued; the next step is `run.step`."""

    def before_step(self, run: Run) -> None:
        """A step begins."""

    def after_step(self, run: Run, result: StepResult) -> None:
        """A step was done; `run.step` counts it."""

    def report(self, run: Run) -> None:
        """The steps so far are to be read from the device: their lines have come by `log`."""

    def log(self, run: Run, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl: that of a step, or of an `event`."""

    def tell(self) -> object:
        """Something small for the other processes, exchanged whenever steps are read."""
        return None

    def hear(self, run: Run, told: Sequence[Any]) -> None:
        """What this callback's `tell` returned on every process, by rank."""

    def after_save(self, run: Run, folder: Path) -> None:
        """A checkpoint is complete, in `folder`; written in the background, some steps after the one it is of."""

    def end(self, run: Run) -> None:
        """The last step is done and saved."""

    def close(self) -> None:
        """Always called once, last, whatever happened."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, see `write_state`; empty: nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; called before `start`, where there is such a state."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that one stage trains with.

    Attributes:
        name: the stage.
        folder: the stage's folder: checkpoints/ and metrics.jsonl appear there.
        objective: what is minimised; not yet prepared by the engine.
        masking: None: the weights alone are trained.
        dynamic: None: domain weights are constant.
        average_weight: that of a step's loss in its domain's average, where averaged training losses update the domain
            weights; None: held-out losses do, or where `teacher_reference` means since the last update.
        teacher_reference: whether the teacher's losses of the same tokens are the reference of domain weights.
        heldout: the text that updates domain weights and tells how good the masks are in the end.
        validation: the text that tells how the stage is doing, where nothing follows it; None: it is not read.
        moments: AdamW state to start from; None: from nothing.
        before_first_step: called by all processes; changes the main process's model in place. Not called where a
            checkpoint is continued.
        kept: masks of a sparse model by the engine's parameter names, True where a weight is kept, each read once: what
            they drop stays 0. None: every weight may become anything.
        moving: masks of a sparse model that are chosen anew while it is trained, in place of `kept`.
        settled_steps: steps that were trained with other settings: no checkpoint before them is continued.
        callbacks: besides those that every stage has.
        processes: those that share the work.
        compute: what a token costs, and what the hardware could do.
        open_trackers: opens where metrics go besides metrics.jsonl, given the first step to come; main process only.

    Raises:
        ValueError: two callbacks of one name.
    """

    name: str
    folder: Path
    schedule: Schedule
    objective: Objective
    engine: Engine
    optimization: Optimization
    mixture: Mixture
    masking: MaskedTraining | None
    dynamic: DynamicMixture | None
    heldout: HeldOut
    average_weight: float | None
    teacher_reference: bool = False
    validation: HeldOut | None = None
    moments: SavedState | None = None
    before_first_step: Callable[[], None] | None = None
    kept: Callable[[], Iterable[tuple[str, Tensor]]] | None = None
    moving: MovingMasks | None = None
    settled_steps: int = 0
    callbacks: tuple[Callback, ...] = ()
    processes: Processes = field(default_factory=Processes)
    compute: Compute = field(default_factory=Compute)
    open_trackers: Callable[[int], Trackers] = field(default=lambda _: Trackers({}))

    def __post_init__(self) -> None:
        names = [callback.name for callback in self.callbacks]
        if len(set(names)) < len(names):
            raise ValueError(f"callbacks of one name: {sorted(names)}")

    @property
    def checkpoints(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.folder / "checkpoints"


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """A process's share of a step, on the device.

    Attributes:
        loss: of the step's mean loss per token; scalar.
        domains: fp64 [M, 2 + K], of each domain's sum in nats, of its number of labels, and of the sums of what the
            objective measures.
        skipped: boolean scalar: whether loss or gradient was not finite; the same on all processes.
    """

    loss: Tensor
    domains: Tensor
    skipped: Tensor


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """What a stop, or the stage's end, has left to do of a step whose weights are there.

    Attributes:
        callbacks: names of those that have not been told of its end.
        skipped: whether it changed nothing.
    """

    callbacks: tuple[str, ...]
    skipped: bool


def _nobody_asks() -> None:
    pass


@dataclass(kw_only=True)
class Run:
    """A stage under way, as its callbacks see it.

    Attributes:
        task: what is trained, and with what.
        model: the objective as the engine prepared it.
        callbacks: all of them, in order.
        prefetcher: deals the samples; knows the domain weights in force.
        console: where messages go.
        display: the live view on it.
        step: optimiser steps done.
        stopping: why the run stops after this step, once all processes know; None: it goes on.
        unfinished: what is left to do of the last step; None: nothing.
        heed: what a measurement calls between two batches, all processes equally often; raises `StopAsked`.
    """

    task: Task
    model: nn.Module
    callbacks: Sequence[Callback]
    prefetcher: Prefetcher
    console: Console
    display: Display
    step: int
    stopping: str | None = None
    unfinished: Unfinished | None = None
    heed: Callable[[], None] = _nobody_asks

    @property
    def ends(self) -> bool:
        """Whether that was the last step."""
        return self.step == self.task.schedule.total_steps

    @property
    def tokens(self) -> int:
        """Trained on in this stage, by all processes."""
        return self.step * self.task.schedule.sequences_per_step * self.task.mixture.sequence_length

    def before_step(self) -> None:
        """Tell the callbacks that a step begins."""
        for callback in self.callbacks:
            callback.before_step(self)

    def after_step(self, result: StepResult) -> None:
        """Count a step, and tell the callbacks.

        Where a stop is heard on the way, those that are left are told where the run continues.
        """
        self.step += 1
        left = list(self.callbacks)
        try:
            while left:
                left[0].after_step(self, result)
                del left[0]
        except StopAsked as asked:
            names = tuple(callback.name for callback in left if not callback.acts_on_stop)
            self.stopping, self.unfinished = asked.signal, Unfinished(callbacks=names, skipped=bool(result.skipped))
            for callback in left:
                if callback.acts_on_stop:
                    callback.after_step(self, result)

    def is_unfinished(self, callback: Callback) -> bool:
        """Whether a callback has not been told of the end of the last step."""
        return self.unfinished is not None and callback.name in self.unfinished.callbacks

    def finish_step(self) -> None:
        """Tell the callbacks that have not been told of the end of the last step, where a run continues.

        Of its result they hear whether it was skipped; the rest is NaN.

        Raises:
            StopAsked: the run is to stop again.
        """
        if self.unfinished is None:
            return
        device = self.task.engine.device
        nan, skipped = torch.tensor(torch.nan, device=device), torch.tensor(self.unfinished.skipped, device=device)
        result = StepResult(loss=nan, domains=nan.double().expand(len(self.task.mixture.domains), 2), skipped=skipped)
        for callback in self.callbacks:
            if self.is_unfinished(callback):
                callback.after_step(self, result)
        self.unfinished = None

    def report(self) -> None:
        """Have what the steps so far left on the device read and written; all processes call it together."""
        for callback in self.callbacks:
            callback.report(self)

    def log(self, line: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl, with its `step`, and show it; what is no step's has an `event`."""
        for callback in self.callbacks:
            callback.log(self, line)

    def end(self) -> None:
        """Tell the callbacks that all is done."""
        for callback in self.callbacks:
            callback.end(self)
