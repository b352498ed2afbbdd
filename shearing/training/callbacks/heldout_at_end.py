"""Held-out losses: of the model as it is now, under masks without noise of the size of the step."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from shearing.data.documents import Documents
from shearing.objectives.objective import Losses
from shearing.training.task import Callback, Run


def measure_held_out(run: Run, *, name: str) -> dict[str, float]:
    """Loss of each domain now, in nats; all processes take part.

    Args:
        run: under way; its next step is as if there had been no measurement.
        name: of the progress bar.
    """
    task, model = run.task, run.model
    if task.masking is not None:
        task.masking.settle(step=run.step)

    def forward(tokens_BT: Tensor, documents: Documents | None) -> Tensor:
        with torch.no_grad(), task.engine.autocast():
            losses: Losses = model(tokens_BT, documents)
        return losses.total

    model.eval()
    with run.display.activity(name, total=task.heldout.tokens) as advance:
        losses = task.heldout.measure(forward, advance)
    model.train()
    return losses


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
            self.losses = measure_held_out(run, name="held-out losses at the end")
