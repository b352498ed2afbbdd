"""The least change of a recipe with which its stages fit their GPUs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from shearing.runs.planning.hardware import Hardware
from shearing.runs.planning.memory import ZERO_STAGES, Checkpointing, Layerwise
from shearing.runs.planning.step.stage_plan import Choice, StagePlan, workload_at
from shearing.runs.planning.step.traced_step import measure

_CHECKPOINTING: Sequence[Checkpointing] = ("none", "selective", "full")

Accepts: TypeAlias = Callable[[Sequence[str]], bool]
"""Whether a recipe takes such overrides."""


def advice_for(stages: Sequence[StagePlan], *, choice: Choice, hardware: Hardware, accepts: Accepts) -> str | None:
    """The smallest change with which all stages fit, where they do not; None where nothing is to be said.

    Args:
        stages: to fit.
        choice: the recipe's.
        hardware: into what.
        accepts: what the recipe refuses is no advice.
    """
    unfit = [stage.stage for stage in stages if hardware.fit(stage.held(choice)) == "no"]
    if not unfit:
        return None
    start = f"{' and '.join(unfit)} will not fit"
    ways = least_changes(stages, choice=choice, hardware=hardware, accepts=accepts)
    if ways is not None:
        return f"{start}; this would: {' and '.join(ways)}"
    return f"{start}, whatever of it can be shared out, offloaded or recomputed: it takes GPUs with more memory"


def least_changes(
    stages: Sequence[StagePlan], *, choice: Choice, hardware: Hardware, accepts: Accepts
) -> list[str] | None:
    """Overrides, and the number of GPUs if it has to be another, with which all stages fit; None if nothing helps.

    Args:
        stages, choice, hardware, accepts: see `advice_for`.
    """
    processes = hardware.processes
    while all(stage.sequences % processes == 0 for stage in stages):
        more = dataclasses.replace(hardware, processes=processes)
        changes = _smallest_change(stages, choice=choice, hardware=more, accepts=accepts)
        if changes is not None:
            ways = [" ".join(changes)] if changes else []
            return ways + ([f"--gpus {processes}"] if processes > hardware.processes else [])
        processes *= 2
    return None


def _smallest_change(
    stages: Sequence[StagePlan], *, choice: Choice, hardware: Hardware, accepts: Accepts
) -> list[str] | None:
    """Overrides with which every stage fits, the least that cost anything; None if there are none.

    Offloading is the last resort; otherwise the fewest keys, then the least sharing and recomputation.
    """
    found: list[tuple[tuple[int, ...], list[str]]] = []
    candidates = list(_candidates(choice, processes=hardware.processes))
    if choice.layerwise is None and not accepts(["training.engine=deepspeed"]):
        candidates += _by_layers(choice, layerwise=stages[0].layerwise)
    for candidate in candidates:
        changed, reduction = candidate.overrides(choice), 0
        if not accepts(changed):
            continue
        for stage in stages:
            size = _largest_micro_batch(stage, choice=candidate, hardware=hardware, accepts=accepts)
            if size is None:
                break
            if size < stage.micro_batch_size:
                changed.append(f"{stage.stage}.micro_batch_size={size}")
                reduction += stage.micro_batch_size - size
        else:
            depth = _CHECKPOINTING.index(candidate.checkpointing)
            cost = (candidate.offloads, len(changed), candidate.zero_stage, depth, reduction)
            found.append((cost, changed))
    return min(found, key=lambda entry: entry[0])[1] if found else None


def _candidates(choice: Choice, *, processes: int) -> Iterator[Choice]:
    """The choice and those that hold less in some way."""
    if choice.layerwise is not None:
        yield from _by_layers(choice, layerwise=choice.layerwise)
        return
    for zero_stage, checkpointing, optimizer, parameters in itertools.product(
        ZERO_STAGES, _deeper(choice), (False, True), (False, True)
    ):
        if zero_stage < choice.zero_stage or optimizer < choice.offload_optimizer:
            continue
        if parameters < choice.offload_parameters or parameters > optimizer:
            continue  # what an offloaded optimiser needs of weights is where it is
        if (optimizer and zero_stage == 0) or (parameters and zero_stage < 3):
            continue  # only ZeRO has another place for them
        # One process has nobody to share with; what ZeRO gives it is that place.
        if zero_stage != choice.zero_stage and processes == 1 and not optimizer:
            continue
        yield dataclasses.replace(
            choice,
            zero_stage=zero_stage,
            checkpointing=checkpointing,
            offload_optimizer=optimizer,
            offload_parameters=parameters,
        )


def _by_layers(choice: Choice, *, layerwise: Layerwise) -> Iterator[Choice]:
    """The choice under FSDP2, and those that hold less in some way."""
    for checkpointing, sums_once in itertools.product(_deeper(choice), {layerwise.sums_once, False}):
        way = dataclasses.replace(layerwise, sums_once=sums_once)
        yield dataclasses.replace(choice.shared_by_layers(way), checkpointing=checkpointing)


def _deeper(choice: Choice) -> Sequence[Checkpointing]:
    """Its checkpointing and those that recompute more."""
    return _CHECKPOINTING[_CHECKPOINTING.index(choice.checkpointing) :]


def _largest_micro_batch(stage: StagePlan, *, choice: Choice, hardware: Hardware, accepts: Accepts) -> int | None:
    """The largest micro-batch up to the recipe's with which a stage fits; None if it does not with one sequence."""
    own = stage.sequences // hardware.processes
    for size in range(stage.micro_batch_size, 0, -1):
        if own % min(size, own):
            continue
        if size < stage.micro_batch_size and not accepts([f"{stage.stage}.micro_batch_size={size}"]):
            continue
        workload = workload_at(
            dataclasses.replace(stage.workload, checkpointing=choice.checkpointing),
            sequences=stage.sequences,
            processes=hardware.processes,
            micro_batch_size=size,
        )
        sharding = choice.sharding(hardware.processes)
        listening = None if stage.listening is None else stage.listening.among(hardware.processes)
        memory = measure(stage.model, workload=workload, sharding=sharding, listening=listening)
        if hardware.fit(memory) == "yes":
            return size
    return None
