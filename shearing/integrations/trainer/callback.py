"""Masks that are learned while Hugging Face's `Trainer` trains the weights."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from shearing import ShearingError
from shearing.files import flush_folder
from shearing.pruning.structured import Masking

MASKS = "masks.pt"
_OURS = re.compile(r"masks-\d+\.pt")
"""Name of the masks' state in a checkpoint of the trainer."""


class LearnMasks(TrainerCallback):
    """Draws masks before each forward pass and makes a step of them after each batch, by an optimiser of their own.

    The trainer's checkpoints get a file more. It is written beside them first: the trainer removes older checkpoints
    before it says that it has saved, so a run that is killed in between has nothing else to continue from. Only where
    a callback behind this one asks for a checkpoint is it written behind the trainer's own files alone.

    While the trainer evaluates, before the first step too, and in the end, masks act without noise.

    Args:
        masking: on the model that the trainer was given.
    """

    def __init__(self, masking: Masking) -> None:
        self.masking = masking
        self._done = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the masks of the checkpoint that is continued; they act without noise until the first step.

        Raises:
            ShearingError: a way to train that has not been shown to be right, micro-batches that do not fit
                `mask_draws`, or a checkpoint without masks.
        """
        one = "one process without it: `shear run` trains on many, with DeepSpeed"
        for name, found, allowed in (
            (
                "fp16",
                args.fp16,
                "bf16=True, or neither: losses in fp16 are scaled, and so would be the masks' gradients",
            ),
            ("fsdp", bool(args.fsdp), one),
            ("deepspeed", args.deepspeed is not None, one),
            ("world_size", args.world_size > 1, "one process: `shear run` trains on many"),
            ("n_gpu", args.n_gpu > 1, "one GPU: CUDA_VISIBLE_DEVICES=0"),
            (
                "load_best_model_at_end",
                args.load_best_model_at_end,
                "False: losses rise while masks close, so the best is the least pruned, and `cut` takes the last masks",
            ),
        ):
            if found:
                raise ShearingError(name, value=getattr(args, name), allowed=allowed, mend="change TrainingArguments")
        size, batch = _sequences(args)
        self.masking.require_shares(sequences=batch, micro_batch_size=size)
        if state.global_step:
            self._take_up(args, state)
        self.masking.settle(step=state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Masks of the first micro-batch, whose gradients are the first of the step.

        What an attempt that ran out of memory has left is forgotten (`auto_find_batch_size`).
        """
        self._done = 0
        for parameter in self.masking.learner.parameters():
            parameter.grad = None
        self._draw(args, state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Masks of the next one."""
        self._done += 1
        self._draw(args, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The masks' gradients."""
        self.masking.after_backward(step=state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step of the masks."""
        self.masking.update(step=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Masks without noise, where the trainer is about to evaluate; and written, where it is about to save."""
        if control.should_evaluate:
            self.masking.settle(step=state.global_step)
        self._write_beside(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As behind a step, for what the trainer does once an epoch."""
        self.on_step_end(args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The masks among the trainer's own files."""
        path, beside = _places(args, state)
        if path.parent.is_dir():
            _write(self.masking.state_dict(), path)
        for each in beside.parent.glob("masks-*.pt"):
            if _OURS.fullmatch(each.name):
                each.unlink()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Masks without noise: what the cut computes, also where training ends before masks have reached the target."""
        self.masking.settle()

    def _take_up(self, args: TrainingArguments, state: TrainerState) -> None:
        path, beside = _places(args, state)
        if path.parent.is_dir() and not path.exists() and beside.exists():
            beside.replace(path)
        if not path.exists():
            raise ShearingError(
                "resume_from_checkpoint",
                value=str(path.parent),
                allowed=f"a checkpoint with {MASKS}, in output_dir",
                mend="continue from an older one, with the output_dir it was written to",
            )
        self.masking.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _write_beside(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        # Whether this is the best model it knows when it has evaluated it.
        may_save = control.should_evaluate and args.save_strategy == SaveStrategy.BEST
        if control.should_save or may_save:
            _write(self.masking.state_dict(), _places(args, state)[1])

    def _draw(self, args: TrainingArguments, state: TrainerState) -> None:
        size, batch = _sequences(args)
        self.masking.draw(step=state.global_step, sequence=self._done * size, of=batch)


def _sequences(args: TrainingArguments) -> tuple[int, int]:
    """Of a micro-batch and of a step. Where the trainer finds smaller ones, only their number counts, which stays."""
    return args.per_device_train_batch_size, args.per_device_train_batch_size * args.gradient_accumulation_steps


def _places(args: TrainingArguments, state: TrainerState) -> tuple[Path, Path]:
    """Of the masks in the checkpoint of this step, and beside it."""
    folder = Path(str(args.output_dir))
    return folder / f"checkpoint-{state.global_step}" / MASKS, folder / f"masks-{state.global_step}.pt"


def _write(masks: dict[str, Any], path: Path) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("wb") as file:
        torch.save(masks, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    flush_folder(path.parent)
