"""Has moving masks chosen when it is time, and logs how many weights came or went."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from shearing.training.engines.moving_masks import MovingMasks
from shearing.training.task import Callback, Run, StepResult


class MaskMoves(Callback):
    """Moves masks after steps; what they set aside is the engine's to save.

    Args:
        masks: which the engine was given.
    """

    def __init__(self, masks: MovingMasks) -> None:
        self._masks = masks
        self._unread: list[tuple[int, Tensor]] = []

    @override
    def start(self, run: Run) -> None:
        """What masks do depends on the step, as far as it is finished."""
        self._masks.begin(step=run.step - int(run.is_unfinished(self)))

    @override
    def after_step(self, run: Run, result: StepResult) -> None:
        """Shrink what is dropped; choose where it is time."""
        changed = self._masks.after_step(step=run.step, skipped=result.skipped)
        if changed is not None:
            self._unread.append((run.step, changed))

    @override
    def report(self, run: Run) -> None:
        """Log the share of weights that changed sides in each choice."""
        unread, self._unread = self._unread, []
        if unread:
            counts = run.task.processes.sum(torch.stack([changed for _, changed in unread])).tolist()
            for (step, _), (changed, total) in zip(unread, counts, strict=True):
                run.log({"step": step, "event": "masks", "changed": changed / max(1.0, total)})
