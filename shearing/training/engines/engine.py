"""What the loop asks of an engine, what an engine is made of, and every engine by name.

The mask learner is not behind this seam: its few fp32 tensors are replicated and have their own optimiser, because an
engine would cast, clip and shard them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from shearing.processes.processes import Processes
from shearing.training.checkpoints.fingerprints import Fingerprints
from shearing.training.checkpoints.pieces import SavedState
from shearing.training.engines.facts import ENGINES
from shearing.training.engines.held_state import StagedShard
from shearing.training.engines.moving_masks import MovingMasks
from shearing.training.engines.optimizer import Optimization
from shearing.training.recipe import TrainingRecipe


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """What a stage has to make an engine of.

    Attributes:
        optimization: AdamW and its schedule.
        training: the recipe's section, with the engine's own settings in it.
        device, precision: where and in what forward passes are computed; bf16 keeps fp32 master weights.
        processes: those of the run.
        micro_batch_size: sequences of a forward pass of one process.
        accumulation: micro-batches of a step of one process.
    """

    optimization: Optimization
    training: TrainingRecipe
    device: torch.device
    precision: torch.dtype
    processes: Processes
    micro_batch_size: int
    accumulation: int


class Engine(Protocol):
    """Computes steps; all processes call every method together."""

    device: torch.device
    loss_scale: float
    """What `backward` multiplies a loss by; gradients of parameters that the engine does not hold have it too."""

    @classmethod
    def of(cls, parts: EngineParts) -> Self:
        """The engine of a stage."""
        ...

    def prepare(self, model: nn.Module) -> nn.Module:
        """Take charge of a model's parameters: placement, optimiser state. Called once, first; returns what to call.

        Weights that are in files are read there, by each process what it will hold (`models.stored.paging.paged`). Of
        all else the main process's are taken; on the others they may be placeholders (see `models.loading.skeleton`).

        Raises:
            ShearingError: a weight that is not finite.
        """
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """The precision in which forward passes and losses are computed."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of one micro-batch's share of the step's loss.

        Args:
            loss: scalar; the step's loss is the sum over micro-batches and processes.
            last: whether this is the step's last micro-batch.
        """
        ...

    def step(self, *, step: int) -> Tensor:
        """Clip, update the weights and clear the gradients.

        Args:
            step: optimiser steps done before this one; the learning rate is a function of it alone.

        Returns:
            Boolean scalar on the device, the same on all processes: True if loss or gradient was not finite, in which
            case neither weights nor optimiser state have changed.
        """
        ...

    def grad_norm(self) -> Tensor:
        """Global norm of the last step's gradient before clipping; scalar on the device."""
        ...

    def stage(self, *, copied: bool = True) -> StagedShard:
        """Share of weights and optimiser state of this process, to be written bit for bit.

        Args:
            copied: to the host at once, so that writing it (`StagedShard.write_into` an existing folder) can go on
                while the engine trains; else it has to be written before the next step, and a tensor is copied at a
                time.
        """
        ...

    def load(self, folder: Path, *, saved: Fingerprints) -> None:
        """Read what all processes of `stage` wrote, however many they were, into the prepared model.

        Args:
            folder: the checkpoint.
            saved: the sum of what writing returned (`add_fingerprints`).

        Raises:
            ShearingError: the folder holds another model's parameters, or they did not come back as they were.
        """
        ...

    def load_moments(self, moments: SavedState) -> None:
        """Start from AdamW state instead of from nothing.

        Raises:
            ShearingError: it is not of the prepared model's parameters.
        """
        ...

    def keep_zeros(self, masks: Iterable[tuple[str, Tensor]]) -> None:
        """Train a sparse model: what the masks drop is 0 from now on, after every step, and checked in `stage`.

        Args:
            masks: parameter and bool mask of its shape, True where a weight is kept; each is read once.

        Raises:
            ShearingError: a mask is of no parameter of the prepared model, or of another shape.
        """
        ...

    def move_masks(self, masks: MovingMasks) -> None:
        """Train a sparse model whose masks move; called before `load`, which restores what they have set aside.

        Args:
            masks: which; they see to it that what they drop is 0 in every forward pass, and `save` checks it.

        Raises:
            ShearingError: a mask is of no parameter of the prepared model, or of another shape.
        """
        ...

    def close(self) -> None:
        """Let go of gradients, optimiser state and all else that was made in `prepare`; called once, last.

        The prepared model is of no use afterwards: where an engine holds weights in its own memory, they go too.
        """
        ...


def engine_of(name: str, *, parts: EngineParts) -> Engine:
    """The engine of a name.

    Args:
        name: one of `ENGINES`.
        parts: what the stage has.
    """
    engine: Engine = resolve_name(ENGINES[name].home).of(parts)
    return engine
