"""What a training stage is made of: its schedule, its held-out text, the masks it learns; and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from typing_extensions import Self

from shearing.data.documents import Documents
from shearing.data.mixture.dynamic import State
from shearing.processes.processes import AgreedEnd
from shearing.processes.stop import INTERRUPTED_EXIT_CODE as INTERRUPTED_EXIT_CODE
from shearing.settings.quantities import Duration
from shearing.training.metrics import StageTotals
from shearing.training.recipe import StageRecipe, TrainingRecipe

PREFETCHED_STEPS = 2
"""Steps dealt ahead, and so the delay until new domain weights hold: a constant, because results depend on it."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Sizes and intervals of a stage; durations in optimiser steps.

    Attributes:
        total_steps: length of the stage.
        sequences_per_step: global batch.
        micro_batch_size: sequences per forward pass of one process; divides its share of the batch.
        checkpoint_interval, keep_last, keep_every: how often, how many stay, and which stay for good (None: none).
        checkpoint_seconds: age of the last checkpoint at which another one is due; None: whatever its age.
        background_checkpoints: whether checkpoints are written while training goes on.
        mixture_interval: steps between two updates of the domain weights.
        validation_interval: steps between two looks at the loss on validation text; None: there are none.
        log_interval: steps between two reads of metrics from the device.
        max_skipped_steps: non-finite steps in a row that stop the run.
    """

    total_steps: int
    sequences_per_step: int
    micro_batch_size: int
    checkpoint_interval: int
    checkpoint_seconds: float | None
    keep_last: int
    keep_every: int | None
    background_checkpoints: bool
    mixture_interval: int
    validation_interval: int | None
    log_interval: int
    max_skipped_steps: int

    @classmethod
    def of(
        cls,
        stage: StageRecipe,
        *,
        training: TrainingRecipe,
        tokens_per_step: int,
        sequence_length: int,
        micro_batch_size: int,
        mixture_interval: Duration,
    ) -> Self:
        """What a recipe says of a stage.

        Args:
            stage: its section.
            training: the section `training`.
            tokens_per_step: of a global batch.
            sequence_length: tokens of a row.
            micro_batch_size: sequences per forward pass, which several processes may have made smaller.
            mixture_interval: time between two updates of the domain weights.
        """
        total = stage.duration.in_steps(tokens_per_step=tokens_per_step)

        def interval(duration: Duration) -> int:
            return max(1, duration.in_steps(tokens_per_step=tokens_per_step, total_steps=total))

        return cls(
            total_steps=total,
            sequences_per_step=tokens_per_step // sequence_length,
            micro_batch_size=micro_batch_size,
            checkpoint_interval=interval(stage.checkpoint_interval),
            checkpoint_seconds=None if stage.checkpoint_minutes is None else 60 * stage.checkpoint_minutes,
            keep_last=stage.keep_last,
            keep_every=None if stage.keep_every is None else interval(stage.keep_every),
            background_checkpoints=training.checkpoint_writing == "background",
            mixture_interval=interval(mixture_interval),
            validation_interval=None if stage.validation_interval is None else interval(stage.validation_interval),
            log_interval=training.log_interval,
            max_skipped_steps=training.max_skipped_steps,
        )


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out text.

    Attributes:
        tokens: of all domains together, for the progress bar.
        measure: loss of each domain now, in nats, from a forward pass (sum of losses of tokens [B, T] and their
            documents) that all processes take part in; is given what to call with tokens just done.
    """

    tokens: int
    measure: Callable[[Callable[[Tensor, Documents | None], Tensor], Callable[[int], None]], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """For the share of the hardware's peak that training reaches (MFU).

    Attributes:
        flops_per_token: of the dense model that is executed, masks or not.
        peak_flops: of one process's device, per second; None where it is not known.
    """

    flops_per_token: float = 0.0
    peak_flops: float | None = None


class MaskedTraining(Protocol):
    """Masks that are learned while the weights are trained, as a training loop drives them, ours or another's.

    A step is: for each micro-batch `draw`, forward and backward pass; then `after_backward`; the weights' optimiser;
    `update`. All processes call all of it.
    """

    def draw(self, *, step: int, sequence: int, of: int) -> None:
        """Put masks for one micro-batch into the model.

        Args:
            step: optimiser steps done.
            sequence: place of its first row in the step's global batch, from 0.
            of: sequences of the global batch.
        """
        ...

    def after_backward(self, *, step: int, scale: float) -> None:
        """Complete the masks' gradients, once all micro-batches have left theirs.

        Args:
            step: optimiser steps done.
            scale: what losses were multiplied by before their backward pass.
        """
        ...

    def update(self, *, step: int, skip: Tensor) -> Tensor:
        """One optimiser step of the masks.

        Args:
            step: optimiser steps done before this one.
            skip: boolean scalar on the device: True where the weights' step was skipped, and this one has to be.

        Returns:
            As `skip`, and True too where the masks' own gradients were not finite.
        """
        ...

    def settle(self, *, step: int) -> None:
        """Put the masks into the model without noise, at the size that they are to have at `step`.

        Once the masks are fixed that is the target's, and they stay as they are.

        Args:
            step: optimiser steps done.
        """
        ...

    def settled_parameters(self, *, step: int) -> int:
        """Parameters of the model that `settle` leaves, embeddings included."""
        ...

    def metrics(self, *, step: int) -> dict[str, Tensor]:
        """Scalars for the metrics of a step, by `kind/name`; nothing waits for the device."""
        ...

    def expected_parameters(self, *, step: int) -> float:
        """Parameters of the model that the masks leave, in expectation, embeddings included."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit."""
        ...


class Interrupted(AgreedEnd):
    """Asked to stop by a signal; the checkpoint is written and the same command continues."""

    def __init__(self) -> None:
        super().__init__(INTERRUPTED_EXIT_CODE)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What `train` leaves.

    Attributes:
        totals: figures of the stage.
        checkpoint: folder of the last checkpoint, that of the final step.
        heldout: loss of each domain at the end, in nats, under the final masks; None unless asked for.
        mixture_rule: state of the rule that updated the domain weights.
    """

    totals: StageTotals
    checkpoint: Path
    heldout: dict[str, float] | None
    mixture_rule: State
