"""What one training stage is made of, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from shearing.data.documents import Documents
from shearing.data.mixture.dynamic import DynamicMixture, State
from shearing.data.mixture.sampler import Mixture
from shearing.processes.processes import AgreedEnd, Processes
from shearing.pruning.structured.masking import Masking
from shearing.training.checkpoints.pieces import SavedState
from shearing.training.engines.engine import Engine
from shearing.training.engines.optimizer import Optimization
from shearing.training.metrics import StageTotals
from shearing.training.trackers import Trackers

INTERRUPTED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later; a launcher can requeue on it."""

PREFETCHED_STEPS = 2
"""Steps dealt ahead, and so the delay until new domain weights hold: a constant, because results depend on it."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Sizes and intervals of a stage; durations in optimiser steps.

    Attributes:
        total_steps: length of the stage.
        sequences_per_step: global batch.
        micro_batch_size: sequences per forward pass of one process; divides its share of the batch.
        mask_draws: equal shares of the global batch that see one draw of the masks each.
        checkpoint_interval, keep_last, keep_every: how often, how many stay, and which stay for good (None: none).
        mixture_interval: steps between two updates of the domain weights.
        log_interval: steps between two reads of metrics from the device.
        max_skipped_steps: non-finite steps in a row that stop the run.
    """

    total_steps: int
    sequences_per_step: int
    micro_batch_size: int
    mask_draws: int
    checkpoint_interval: int
    keep_last: int
    keep_every: int | None
    mixture_interval: int
    log_interval: int
    max_skipped_steps: int


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


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that one stage trains with.

    Attributes:
        name: the stage.
        folder: the stage's folder: checkpoints/ and metrics.jsonl appear there.
        objective: forward pass from tokens [B, T] and their documents to `Losses`; not yet prepared by the engine.
        masking: None: the weights alone are trained.
        dynamic: None: domain weights are constant.
        average_weight: that of a step's loss in its domain's average, where averaged training losses update the domain
            weights; None: held-out losses do.
        heldout: the text that updates domain weights and tells how good the masks are in the end.
        moments: AdamW state to start from; None: from nothing.
        before_first_step: changes the main process's model in place; not called where a checkpoint is continued.
        kept: masks of a sparse model by the engine's parameter names, True where a weight is kept, each read once: what
            they drop stays 0. None: every weight may become anything.
        processes: those that share the work.
        compute: what a token costs, and what the hardware could do.
        open_trackers: opens where metrics go besides metrics.jsonl, given the first step to come; main process only.
    """

    name: str
    folder: Path
    schedule: Schedule
    objective: nn.Module
    engine: Engine
    optimization: Optimization
    mixture: Mixture
    masking: Masking | None
    dynamic: DynamicMixture | None
    heldout: HeldOut
    average_weight: float | None = None
    moments: SavedState | None = None
    before_first_step: Callable[[], None] | None = None
    kept: Callable[[], Iterable[tuple[str, Tensor]]] | None = None
    processes: Processes = field(default_factory=Processes)
    compute: Compute = field(default_factory=Compute)
    open_trackers: Callable[[int], Trackers] = field(default=lambda _: Trackers({}))


class Interrupted(AgreedEnd):
    """Asked to stop by a signal; the checkpoint is written and the same command continues."""

    def __init__(self) -> None:
        super().__init__(INTERRUPTED_EXIT_CODE)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What `train` leaves.

    Attributes:
        totals: figures of this process's part of the stage.
        checkpoint: folder of the last checkpoint, that of the final step.
        heldout: loss of each domain at the end, in nats, under the final masks; None unless asked for.
        mixture_rule: state of the rule that updated the domain weights.
    """

    totals: StageTotals
    checkpoint: Path
    heldout: dict[str, float] | None
    mixture_rule: State
