"""The least change of a recipe with which its stages fit their GPUs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from shearing.runs.planning.hardware import Hardware
from shearing.runs.planning.memory import ZERO_STAGES, Checkpointing
from shearing.runs.planning.step.stage_plan import Choice, StagePlan, workload_at
from shearing.runs.planning.step.traced_step import measure

_CHECKPOINTING: Sequence[Checkpointing] = ("none", "selective", "full")


def advice_for(stages: Sequence[StagePlan], *, choice: Choice, hardware: Hardware) -> str | None:
    """The smallest change with which all stages fit, where they do not; None where nothing is to be said."""
    unfit = [stage.stage for stage in stages if hardware.fit(stage.held(choice)) == "no"]
    if not unfit:
        return None
    start = f"{' and '.join(unfit)} will not fit"
    ways = least_changes(stages, choice=choice, hardware=hardware)
    if ways is not None:
        return f"{start}; this would: {' and '.join(ways)}"
    return f"{start}, whatever is shared out, offloaded or recomputed: it takes GPUs with more memory"


def least_changes(stages: Sequence[StagePlan], *, choice: Choice, hardware: Hardware) -> list[str] | None:
    """Overrides, and the number of GPUs if it has to be another, with which all stages fit; None if nothing helps."""
    processes = hardware.processes
    while all(stage.sequences % processes == 0 for stage in stages):
        changes = _smallest_change(stages, choice=choice, hardware=dataclasses.replace(hardware, processes=processes))
        if changes is not None:
            ways = [" ".join(changes)] if changes else []
            return ways + ([f"--gpus {processes}"] if processes > hardware.processes else [])
        processes *= 2
    return None


def _smallest_change(stages: Sequence[StagePlan], *, choice: Choice, hardware: Hardware) -> list[str] | None:
    """Overrides with which every stage fits, the least that cost anything; None if there are none.

    Offloading is the last resort; otherwise the fewest keys, then the least sharing and recomputation.
    """
    found: list[tuple[tuple[int, ...], list[str]]] = []
    for candidate in _candidates(choice, processes=hardware.processes):
        changed, reduction = candidate.overrides(choice), 0
        for stage in stages:
            size = _largest_micro_batch(stage, choice=candidate, hardware=hardware)
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
    deeper = _CHECKPOINTING[_CHECKPOINTING.index(choice.checkpointing) :]
    if choice.layerwise is not None:
        for checkpointing, sums_once in itertools.product(deeper, {choice.layerwise.sums_once, False}):
            layerwise = dataclasses.replace(choice.layerwise, sums_once=sums_once)
            yield dataclasses.replace(choice, checkpointing=checkpointing, layerwise=layerwise)
        return
    for zero_stage, checkpointing, optimizer, parameters in itertools.product(
        ZERO_STAGES, deeper, (False, True), (False, True)
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


def _largest_micro_batch(stage: StagePlan, *, choice: Choice, hardware: Hardware) -> int | None:
    """The largest micro-batch up to the recipe's with which a stage fits; None if it does not with one sequence."""
    own = stage.sequences // hardware.processes
    for size in range(stage.micro_batch_size, 0, -1):
        if own % min(size, own):
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
