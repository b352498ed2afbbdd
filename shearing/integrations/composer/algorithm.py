"""Masks that are learned while Composer's trainer trains the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer.core import Algorithm, Event, Precision, State
from composer.loggers import Logger
from composer.utils import dist

from shearing import ShearingError
from shearing.pruning.structured import Masking


class LearnMasks(Algorithm):
    """Draws masks before each forward pass and makes a step of them after each batch, by an optimiser of their own.

    The penalty that holds sizes is no part of `state.loss`: it is the same on every process and in every micro-batch,
    so its gradient is added once, when all of them have left theirs. Masks are outside of the model, so neither
    clipping nor the trainer's optimiser touches them, and in its checkpoints they are this algorithm's state. While
    evaluators run, and after the fit, masks act without noise.

    Args:
        masking: on the model that the trainer was given.
        log_interval: batches between two logs of expected and target sizes, which wait for the device.
    """

    def __init__(self, masking: Masking, *, log_interval: int = 10) -> None:
        super().__init__()
        self.masking, self.log_interval = masking, log_interval
        self._rows, self._done, self._ended = 0, 0, False

    def match(self, event: Event, state: State) -> bool:
        """Whether anything is to be done at an event."""
        del state
        return event in _DOES

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do it."""
        _DOES[event](self, state, logger)

    def state_dict(self) -> dict[str, Any]:
        """What the trainer's checkpoint keeps."""
        return {**super().state_dict(), "masking": self.masking.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit."""
        self.masking.load_state_dict(state["masking"])

    def check(self, state: State, logger: Logger) -> None:
        """Refuse what has not been shown to be right.

        Raises:
            ShearingError: fp16, whose losses are scaled, or FSDP.
        """
        del logger
        self._ended = False
        if state.precision == Precision.AMP_FP16:
            raise ShearingError(
                "precision",
                value=str(state.precision),
                allowed="fp32 or amp_bf16: losses in fp16 are scaled, and so would be the gradients of the masks",
                mend='Trainer(precision="amp_bf16")',
            )
        if state.fsdp_enabled:
            raise ShearingError(
                "parallelism_config",
                value="fsdp",
                allowed="one process, or several with DDP",
                mend="leave it out, or learn the masks with `shear run` under DeepSpeed",
            )

    def start_batch(self, state: State, logger: Logger) -> None:
        """Note the rows of the step."""
        del logger
        self._rows = len(state.batch["input_ids"])

    def start_attempt(self, state: State, logger: Logger) -> None:
        """Forget the masks' gradients of an attempt that ran out of memory.

        Raises:
            ShearingError: micro-batches that do not fit `mask_draws`.
        """
        del logger
        size = min(int(state.device_train_microbatch_size or self._rows), self._rows)
        self.masking.require_shares(sequences=self._rows * dist.get_world_size(), micro_batch_size=size)
        self._done = 0
        for parameter in self.masking.learner.parameters():
            parameter.grad = None

    def draw(self, state: State, logger: Logger) -> None:
        """Masks of a micro-batch."""
        del logger
        sequence = dist.get_global_rank() * self._rows + self._done
        self.masking.draw(step=_step(state), sequence=sequence, of=self._rows * dist.get_world_size())
        self._done += len(state.batch["input_ids"])

    def step(self, state: State, logger: Logger) -> None:
        """The step of the masks, once all micro-batches have left their gradients."""
        del logger
        # Each process's loss is a mean over its own rows, where ours is its part of the mean over all.
        self.masking.after_backward(step=_step(state), scale=float(dist.get_world_size()))
        self.masking.update(step=_step(state))

    def log(self, state: State, logger: Logger) -> None:
        """Expected and target sizes, and how far they are apart."""
        if _step(state) % self.log_interval == 0:
            figures = self.masking.metrics(step=_step(state) - 1)
            logger.log_metrics({f"masks/{name}": float(value) for name, value in figures.items()})

    def settle(self, state: State, logger: Logger) -> None:
        """Masks without noise, of the size of this step; after the fit, what the cut computes."""
        del logger
        self.masking.settle(step=None if self._ended else _step(state))

    def end(self, state: State, logger: Logger) -> None:
        """What the cut computes, also where the fit ends before masks have reached the target."""
        self._ended = True
        self.settle(state, logger)


def _step(state: State) -> int:
    """Optimiser steps done."""
    return int(state.timestamp.batch.value)


_DOES = {
    Event.FIT_START: LearnMasks.check,
    Event.BATCH_START: LearnMasks.start_batch,
    Event.BEFORE_TRAIN_BATCH: LearnMasks.start_attempt,
    Event.BEFORE_FORWARD: LearnMasks.draw,
    Event.AFTER_TRAIN_BATCH: LearnMasks.step,
    Event.BATCH_END: LearnMasks.log,
    Event.EVAL_START: LearnMasks.settle,
    Event.FIT_END: LearnMasks.end,
}
