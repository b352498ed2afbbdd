"""The plan of a run as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shearing.runs.planning.hardware import GPUS
from shearing.runs.planning.memory import ZERO_STAGES, Memory
from shearing.runs.planning.phases import Phase
from shearing.runs.planning.plan import RunPlan
from shearing.runs.planning.step.stage_plan import StagePlan
from shearing.runs.planning.summary import shape_cells
from shearing.settings.quantities import format_tokens

_UNITS = {"GB": 1e9, "MB": 1e6}
_FEW_TOKENS = 10**7
"""Below them two decimals of a billion say little."""


def render(plan: RunPlan) -> RenderableType:
    """The plan as tables for a terminal."""
    hardware = plan.hardware
    size = "" if hardware.memory is None else f" of {hardware.memory / 1e9:.0f} GB"
    precision = "bf16" if plan.precision == torch.bfloat16 else "fp32"
    title = Text(f"{plan.name} on {hardware.processes} x {hardware.name}{size}, {precision}")
    parts: list[RenderableType] = [title, "", _shapes(plan), "", _stages(plan)]
    parts += [Text(note, style="dim") for note in _notes(plan)]
    unit = _unit_of(stage.held(plan.choice).total for stage in plan.stages)
    parts += ["", Text(f"memory of one GPU in {unit} when it holds most ({_settings(plan)})"), _memory(plan, unit=unit)]
    if hardware.memory is None:
        parts.append(Text("whether it fits: give --memory GB, or --gpu with one of the names above"))
    if any(hardware.fit(stage.held(plan.choice)) == "tight" for stage in plan.stages):
        parts.append(Text("tight: less than a tenth is left for CUDA's context, workspaces and fragmentation"))
    if plan.advice is not None:
        parts += ["", Text(plan.advice, style="bold")]
    return Group(*parts)


def render_phases(plan: RunPlan, *, phases: Sequence[Phase]) -> RenderableType:
    """What the run does one after the other, as a table for a terminal."""
    processes = plan.hardware.processes
    unit = _unit_of(size for phase in phases for size in (phase.memory, phase.host, phase.disk))
    table = _table("phase", "times", "seconds", *(f"{where}, {unit}" for where in ("GPU", "host", "disk")), "idle")
    for phase in phases:
        idle = processes - phase.processes
        table.add_row(
            phase.what,
            f"{phase.times:,}",
            "" if phase.seconds is None else f"{phase.seconds:,.3g}" if phase.seconds < 10 else f"{phase.seconds:,.0f}",
            *(f"{size / _UNITS[unit]:,.1f}" if size else "" for size in (phase.memory, phase.host, phase.disk)),
            f"{idle} of {processes}" if idle else "",
        )
    return Group(
        table,
        Text("seconds: of compute, of once; what disks and the network take is not in them", style="dim"),
        Text("GPU, host: of the process that holds most; disk: of all together", style="dim"),
    )


def render_totals(plans: Sequence[RunPlan]) -> RenderableType:
    """What the runs of a cascade take together, as a line for a terminal."""
    stages = [stage for plan in plans for stage in plan.stages]
    flops = sum(stage.flops + stage.teacher_flops + (stage.heldout_flops or 0.0) for stage in stages)
    times = [stage.seconds for stage in stages if stage.seconds is not None]
    hours = f"{sum(times) / 3600:,.1f} hours at MFU {plans[0].hardware.mfu:g}, " if len(times) == len(stages) else ""
    disk = f"checkpoints {_size(sum(stage.disk for stage in stages))}"
    return Text(f"all {len(plans)} runs: {flops:.2e} FLOPs, {hours}{disk}", style="bold")


def _shapes(plan: RunPlan) -> Table:
    table = _table("model", "parameters", "without embeddings", "shape")
    table.add_row("source", *shape_cells(plan.source))
    if plan.teacher is not None:
        table.add_row("teacher", *shape_cells(plan.teacher))
    if plan.target is not None and plan.budget is None:
        table.add_row("target", *shape_cells(plan.target))
    elif plan.target is not None:
        about = f"to be learned; figures below are of the source with {plan.target.num_hidden_layers} layers"
        table.add_row("target", f"{plan.budget:,} at most", "", about)
    for name, shape in plan.family.items():
        table.add_row(name, *shape_cells(shape))
    return table


def _embeddings(plan: RunPlan) -> Iterator[str]:
    """Share of the parameters that depends on the vocabulary, of each model whose shape is known."""
    shapes = {"source": plan.source, **({} if plan.target is None or plan.budget else {"target": plan.target})}
    last = list(shapes)[-1]
    if isinstance(plan.vocab_size, int):
        tokens = min(plan.vocab_size, shapes[last].vocab_size)
        shapes[f"{last} with {tokens:,} tokens"] = replace(shapes[last], vocab_size=tokens)
    for name, shape in shapes.items():
        whole, rest = shape.num_parameters(), shape.num_parameters(embeddings=False)
        yield f"{(whole - rest) / whole:.0%} of the {name}"


def _stages(plan: RunPlan) -> Table:
    hours = f"hours at MFU {plan.hardware.mfu:g}"
    teacher = [] if plan.teacher is None else ["teacher's FLOPs"]
    table = _table("stage", "steps", "tokens", "FLOPs", *teacher, "held-out FLOPs", hours, "checkpoints", "staged")
    for stage in plan.stages:
        table.add_row(
            stage.stage,
            f"{stage.steps:,}",
            f"{stage.tokens / 1e9:,.2f}B" if stage.tokens >= _FEW_TOKENS else format_tokens(stage.tokens),
            f"{stage.flops:.2e}",
            *([f"{stage.teacher_flops:.2e}"] if teacher else []),
            "n/a" if stage.heldout_flops is None else f"{stage.heldout_flops:.2e}",
            "n/a" if stage.seconds is None else f"{stage.seconds / 3600:,.1f}",
            _size(stage.disk),
            _size(stage.held(plan.choice).staging),
        )
    return table


def _notes(plan: RunPlan) -> Iterator[str]:
    yield f"parameters of embedding and head: {', '.join(_embeddings(plan))}"
    if plan.learned:
        yield "source: its sizes are learned by the run before; figures are of what that was cut from, so at most"
    if plan.within_documents:
        yield "FLOPs and hours: at most; attention is counted over whole rows, within documents it takes less"
    yield "checkpoints: on disk, all that are there at once; staged: what each process copies to the host to write one"
    if plan.rotated:
        yield f"rotation: the source once more on disk, {_size(plan.rotated)} until mask learning is complete"
    if plan.refitted:
        yield f"compensation: refitted layers on disk, at most {_size(plan.refitted)} until training begins"
    if any(stage.workload.moving for stage in plan.stages):
        yield "pretrain: optimizer and checkpoints with what moving masks set aside, 4 bytes for each of their weights"
    if any(not stage.held(plan.choice).traced for stage in plan.stages):
        yield "memory: by arithmetic; what this model computes depends on numbers, so it cannot be traced without them"
    if plan.one_shot:
        parts = ", ".join(f"{_size(count)} of {what}" for what, count in plan.working.parts.items())
        kept = f", and keeps {parts} meanwhile" if parts else ""
        held = "the model" if plan.one_shot_whole else "one layer at a time"
        yield f"sparsify: not in these figures; it holds {held} on one GPU, writes two models{kept}"
    if plan.family:
        models = 4 * sum(shape.num_parameters() for shape in plan.family.values())
        yield (
            f"family: pretrain computes the whole model, whatever size a step trains; {', '.join(plan.family)} add "
            f"{models / 1e9:,.2f} GB of models in fp32"
        )
    if plan.adapters:
        yield "pretrain: at most; figures are those of training all weights, adapters take less memory and disk"
    if any(stage.seconds is None for stage in plan.stages):
        known = ", ".join(gpu.name for gpu in GPUS)
        yield f"hours: no peak is known of {plan.hardware.name}; name a GPU with --gpu: {known}"
    if any(stage.heldout_flops is None for stage in plan.stages):
        yield "held-out losses are left out: neither data.domains nor the corpus says how many domains there are"


def _settings(plan: RunPlan) -> str:
    batches = ", ".join(f"{stage.stage} {stage.workload.micro_batch_size}" for stage in plan.stages)
    return f"micro-batch: {batches} sequences; activation checkpointing: {plan.choice.checkpointing}"


def _memory(plan: RunPlan, *, unit: str) -> Table:
    teacher = [] if plan.teacher is None else ["teacher"]
    table = _table(
        "stage", "engine", "weights", "gradients", "optimizer", "activations", *teacher, "total", "fits", "when"
    )
    table.collapse_padding = True  # all of it in 80 columns
    engines = {stage.stage: _engines(stage) for stage in plan.stages}
    host = any(memory.host for of_stage in engines.values() for memory in of_stage.values())
    if host:
        table.add_column("in host memory", justify="right", overflow="fold")
    choice = plan.choice
    own = "FSDP2" if choice.layerwise is not None else f"ZeRO-{choice.zero_stage}" if choice.zero_stage else "torch"
    for name, of_stage in engines.items():
        for engine, memory in of_stage.items():
            chosen = engine == own
            held = [memory.weights, memory.gradients, memory.optimizer, memory.activations]
            held += [memory.teacher] if teacher else []
            held.append(memory.total)
            table.add_row(
                name if engine == "torch" else "",
                f"{engine} (chosen)" if chosen else engine,
                *(f"{count / _UNITS[unit]:,.1f}" for count in held),
                plan.hardware.fit(memory),
                memory.moment.partition(",")[0],
                *([f"{memory.host / _UNITS[unit]:,.1f}"] if host else []),
                style="bold" if chosen else None,
            )
    return table


def _engines(stage: StagePlan) -> dict[str, Memory]:
    """What a process holds under every engine."""
    zero = {f"ZeRO-{number}" if number else "torch": stage.under_zero(number) for number in ZERO_STAGES}
    return {**zero, "FSDP2": stage.under_fsdp2()}


def _unit_of(sizes: Iterable[int]) -> str:
    """The unit of a table in which these bytes stand: the largest of them is not below one of it."""
    return "GB" if max(sizes, default=0) >= _UNITS["GB"] else "MB"


def _size(count: float) -> str:
    unit = _unit_of([int(count)])
    return f"{count / _UNITS[unit]:,.1f} {unit}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        words = column in ("model", "shape", "stage", "engine", "fits", "when", "phase")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table
