"""Held-out losses: of the model as it is now, under masks without noise of the size of the step."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from typing_extensions import override

from shearing.data.documents import Documents
from shearing.objectives.objective import Losses
from shearing.training.stage import HeldOut
from shearing.training.task import Callback, Run, StepResult


def measure_held_out(run: Run, text: HeldOut, *, name: str) -> dict[str, float]:
    """Loss of each domain now, in nats; all processes take part.

    Args:
        run: under way; its next step is as if there had been no measurement.
        text: what is read.
        name: of the progress bar.

    Raises:
        StopAsked: all processes heard between two batches that the run is to stop.
    """
    task, model = run.task, run.model
    if task.masking is not None:
        task.masking.settle(step=run.step)

    def forward(tokens_BT: Tensor, documents: Documents | None) -> Tensor:
        with torch.no_grad(), task.engine.autocast():
            losses: Losses = model(tokens_BT, documents)
        return losses.total

    model.eval()
    try:
        with run.display.activity(name, total=text.tokens) as advance:

            def passed(tokens: int) -> None:
                advance(tokens)
                run.heed()

            return text.measure(forward, passed)
    finally:
        model.train()


class Validation(Callback):
    """Measures the losses on validation text every now and then; nothing follows them.

    Args:
        text: what is read; None: nothing is.
        ends: whether to after the last step too.
    """

    def __init__(self, text: HeldOut | None, *, ends: bool) -> None:
        self._text, self._ends = text, ends

    @override
    def after_step(self, run: Run, result: StepResult) -> None:
        """Measure if it is due."""
        interval = run.task.schedule.validation_interval
        if self._text is None or interval is None or run.step % interval or (run.ends and not self._ends):
            return
        run.report()
        started = time.monotonic()
        losses = measure_held_out(run, self._text, name="validation losses")
        seconds = time.monotonic() - started
        run.log({"step": run.step, "event": "validation", "losses": losses, "seconds": seconds})


class HeldOutAtEnd(Callback):
    """Measures held-out losses after the last step.

    Args:
        wanted: whether to.
    """

    def __init__(self, *, wanted: bool) -> None:
        self.losses: dict[str, float] | None = None
        self._wanted = wanted

    @override
    def end(self, run: Run) -> None:
        """Measure."""
        if self._wanted:
            self.losses = measure_held_out(run, run.task.heldout, name="held-out losses at the end")
