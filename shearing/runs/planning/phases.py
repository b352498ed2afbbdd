"""What a run does one after the other: who works meanwhile, and what the busiest of them holds.

Figures of compute and memory follow from shapes; how long a disk takes nobody says, so bytes stand for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from shearing.data.corpus.corpus import whole_rows
from shearing.data.documents import Inputs
from shearing.models.shape import Shape
from shearing.pruning.sparse.criteria.facts import CRITERIA
from shearing.pruning.sparse.recipe import OneShotRecipe
from shearing.pruning.structured.importance.metric import Cost, Evidence
from shearing.pruning.structured.importance.registry import METRICS, metric_of
from shearing.pruning.structured.masking.recipe import FamilyRecipe
from shearing.pruning.structured.refitting.linear import refit_cost
from shearing.runs.continuation.family import importance_of, sorting_cost
from shearing.runs.planning.capacity import copies, is_shared_out, judged, loaded, measured, one_layer, weighed
from shearing.runs.planning.disk import SEQLEN
from shearing.runs.planning.hardware import flops_of, forward_flops_per_token, rotation_flops
from shearing.runs.planning.memory import BF16, CHECKPOINT_BYTES_PER_PARAMETER, FP32
from shearing.runs.planning.plan import RunPlan, num_domains, reads_reference
from shearing.runs.planning.step.stage_plan import StagePlan
from shearing.runs.recipe import Recipe
from shearing.training.adapters.recipe import SpeftRecipe


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Something that all processes have behind them before the next begins.

    Attributes:
        what: it is.
        processes: that work; the others wait.
        memory: bytes of the GPU that holds most, at least.
        host: bytes in the memory of the host of one process, at most.
        disk: bytes read or written, of all processes together.
        flops: of all processes together; None where nothing says how much is read.
        times: how often it happens.
        seconds: of once; None where no speed or no number of FLOPs is known.
    """

    what: str
    processes: int
    memory: int = 0
    host: int = 0
    disk: int = 0
    flops: float | None = 0.0
    times: int = 1
    seconds: float | None = None


def phases(recipe: Recipe, *, made: RunPlan, evaluates: bool = True) -> list[Phase]:
    """Everything from loading to the last table, in order.

    Args:
        recipe: of the run.
        made: its plan.
        evaluates: whether it does, which a run on the way of a cascade does not.

    Raises:
        ShearingError: a metric that cannot score the source.
    """
    peak = None if made.hardware.gpu is None else made.hardware.gpu.peak.get(made.precision)
    found = []
    for phase in [*_phases(recipe, made=made), *(_evaluation(recipe, made=made) if evaluates else ())]:
        seconds = phase.seconds
        if seconds is None and peak is not None and phase.flops:
            seconds = phase.flops / (peak * made.hardware.mfu * phase.processes)
        found.append(dataclasses.replace(phase, seconds=seconds))
    return found


def _phases(recipe: Recipe, *, made: RunPlan) -> Iterator[Phase]:
    for stage in made.stages:
        if stage.stage == "prune" and made.rotated:
            yield _rotation(recipe, made=made)
        if stage.stage == "pretrain" and recipe.sparsify is not None:
            yield _one_shot(recipe, settings=recipe.sparsify, shape=stage.shape, made=made)
        held = loaded(stage.shape, recipe=recipe, made=made)
        if held == _fp32(stage.shape):
            held += copies(stage.shape, made=made)
        heard = stage.listening
        yield Phase(
            what=f"{stage.stage}: load",
            processes=made.hardware.processes,
            memory=loaded(stage.shape, recipe=recipe, made=made) + (0 if heard is None else heard.loaded),
            disk=(2 * stage.shape.num_parameters() if stage is made.stages[0] else _fp32(stage.shape))
            + _brought_back(recipe, stage=stage),
        )
        if reads_reference(recipe, stage=stage.stage):
            yield Phase(
                what=f"{stage.stage}: reference losses",
                processes=made.hardware.processes,
                memory=held,
                flops=None if stage.heldout_flops is None else stage.reference_flops,
            )
        if stage.stage == "prune":
            yield from _choice(recipe, made=made, held=held)
        if stage.stage == "pretrain" and recipe.family is not None:
            yield _sorting(recipe, family=recipe.family, shape=stage.shape, made=made, held=held)
        if stage.stage == "pretrain":
            yield from _weighing(recipe, shape=stage.shape, made=made, held=held)
        yield from _training(recipe, stage=stage, made=made)
        if stage.stage == "pretrain" and made.family:
            yield Phase(
                what=f"pretrain: cut {len(made.family)} sizes",
                processes=1,
                host=one_layer(stage.shape),
                disk=sum(_fp32(stage.shape) + _fp32(shape) for shape in made.family.values()),
            )
        if stage.stage == "prune" and made.target is not None:
            yield Phase(
                what="cut",
                processes=1,
                host=one_layer(stage.shape),  # of its check, which has one model after the other
                disk=_fp32(stage.shape) + _fp32(made.target),
            )


def _rotation(recipe: Recipe, *, made: RunPlan) -> Phase:
    """All find the basis, and the main process writes the source in it, a tensor at a time."""
    alone = made.hardware.processes == 1
    return Phase(
        what="prune: rotate",
        processes=made.hardware.processes,
        memory=loaded(made.source, recipe=recipe, made=made) if alone else one_layer(made.source),
        disk=2 * made.source.num_parameters() + made.rotated,
        flops=rotation_flops(made.source, prune=recipe.pruning.prune, sequence_length=recipe.data.sequence_length),
    )


def _one_shot(recipe: Recipe, *, settings: OneShotRecipe, shape: Shape, made: RunPlan) -> Phase:
    """The main process zeroes weights layer by layer, in fp32 at most: two passes of each layer over the text.

    Choosing levels by text is not foretold, and scores and what is made up for of kept weights are not counted.
    """
    length, matrices = settings.seqlen or SEQLEN, 4 * sum(shape.layer_parameters())
    tokens = settings.samples * length if settings.pruning_reads_text else 0
    passes, copies_of_layer = 5 if settings.true_sequential else 2, 1
    if "gradients" in CRITERIA[settings.criterion].needs:
        passes, copies_of_layer = passes + 4, 3  # forward, once more and backward; gradients and their sums
    waiting = 4 * tokens * shape.hidden_size
    head = 2.0 * shape.vocab_size * shape.hidden_size
    of_layers = forward_flops_per_token(shape, sequence_length=length) - head
    # Read, written layer by layer, and put together.
    written = 3 * (_fp32(shape) if "compact" in recipe.stages else 2 * shape.num_parameters())
    return Phase(
        what=f"sparsify: {settings.criterion}",
        processes=1,
        memory=copies_of_layer * matrices + (waiting if settings.offload == "none" else 0),
        host=waiting if settings.offload == "cpu" else 0,
        disk=written + sum(made.working.parts.values()),
        flops=None if settings.allocation_reads_text else passes * tokens * of_layers,
    )


def _choice(recipe: Recipe, *, made: RunPlan, held: int) -> Iterator[Phase]:
    """Scores that grade the start, and the refit."""
    prune, length = recipe.pruning.prune, recipe.data.sequence_length
    target = made.target if made.budget is None else None
    rows = whole_rows(prune.calibration_tokens, sequence_length=length)
    if (name := prune.graded_by) is not None:
        # Sizes alone: what it costs depends on how much text there is, not on what it says.
        text = (Inputs(torch.empty(rows, length, dtype=torch.int64, device="meta"), None),)
        evidence = Evidence(text=text if METRICS[name].reads_text else (), target=target, seed=recipe.seed)
        cost = metric_of(name).cost(made.source, evidence=evidence)
        yield Phase(
            what=f"prune: importance ({METRICS[name].title})",
            processes=made.hardware.processes,
            memory=held,
            host=_share(cost.kept_bytes, made=made),
            flops=_flops(cost, made=made, length=length),
        )
    if prune.refits(sequence_length=length) and made.target is not None:
        cost = refit_cost(
            made.source,
            target=made.target,
            text_tokens=rows * length,
            ridge=prune.refit_ridge,
            blocks=prune.block_refit,
            sequence_length=length,
        )
        yield Phase(
            what="prune: refit",
            processes=made.hardware.processes,
            memory=held,
            disk=made.refitted if _refits_through_files(recipe, made=made) else 0,
            flops=_flops(cost, made=made, length=length),
        )


def _refits_through_files(recipe: Recipe, *, made: RunPlan) -> bool:
    """Whether refitted layers are written: one process that holds all weights changes them where they are."""
    alone = made.hardware.processes == 1
    return not (alone and recipe.training.holds_all_in_fp32(bf16=made.precision == torch.bfloat16))


def _sorting(recipe: Recipe, *, family: FamilyRecipe, shape: Shape, made: RunPlan, held: int) -> Phase:
    """What sorts the units of a family."""
    cost = sorting_cost(recipe, family=family, shape=shape, smallest=list(made.family.values())[-1])
    return Phase(
        what=f"pretrain: importance ({METRICS[importance_of(recipe, family=family)].title})",
        processes=made.hardware.processes,
        memory=held,
        host=_share(cost.kept_bytes, made=made),
        flops=flops_of(cost, shape, sequence_length=recipe.data.sequence_length),
    )


def _brought_back(recipe: Recipe, *, stage: StagePlan) -> int:
    """Bytes that are read of the dense model, for masks that move."""
    if recipe.sparsify is None:
        return 0
    return (FP32 if "compact" in recipe.stages else BF16) * stage.workload.moving


def _weighing(recipe: Recipe, *, shape: Shape, made: RunPlan, held: int) -> Iterator[Phase]:
    """What the main process measures alone, by which weights are chosen: to be trained, or to stay when masks move.

    Ranking the weights, and what depends on the text, are not counted.
    """
    length, moving, speft = recipe.data.sequence_length, recipe.pretrain.ast, recipe.pretrain.adapters
    per_token = forward_flops_per_token(shape, sequence_length=length)
    if moving is not None and moving.scores == "wanda":
        yield Phase(
            what="pretrain: norms of inputs",
            processes=1,
            memory=held,
            flops=per_token * moving.samples * length,
        )
    if isinstance(speft, SpeftRecipe):
        yield Phase(
            what=f"pretrain: salience ({speft.salience})",
            processes=1,
            memory=weighed(shape, settings=speft, recipe=recipe, made=made),
            flops=0.0 if speft.salience == "magnitude" else 3 * per_token * speft.samples * length,
        )


def _training(recipe: Recipe, *, stage: StagePlan, made: RunPlan) -> Iterator[Phase]:
    if not stage.steps:
        return
    settings, length = recipe.training_stages[stage.stage], recipe.data.sequence_length
    memory = stage.held(made.choice)
    checkpoints = stage.steps // max(1, settings.in_steps(settings.checkpoint_interval, sequence_length=length))
    if stage.seconds is not None and settings.checkpoint_minutes is not None:
        checkpoints = max(checkpoints, int(stage.seconds / (60 * settings.checkpoint_minutes)))
    yield Phase(
        what=f"{stage.stage}: a step",
        processes=made.hardware.processes,
        memory=memory.total,
        host=memory.host,
        flops=(stage.flops + stage.teacher_flops) / stage.steps,
        times=stage.steps,
    )
    yield Phase(
        what=f"{stage.stage}: held-out losses, all",
        processes=made.hardware.processes,
        memory=memory.total,
        flops=None if stage.heldout_flops is None else stage.heldout_flops - stage.reference_flops,
    )
    yield Phase(
        what=f"{stage.stage}: a checkpoint",
        processes=made.hardware.processes,
        memory=memory.total,
        host=memory.host + memory.staging,
        disk=CHECKPOINT_BYTES_PER_PARAMETER * stage.shape.num_parameters() + FP32 * stage.workload.moving,
        times=checkpoints,
    )


def _evaluation(recipe: Recipe, *, made: RunPlan) -> Iterator[Phase]:
    """Losses on test text of the source, of what was cut and of what was trained on, and of the baselines."""
    length, domains = recipe.data.sequence_length, num_domains(recipe)
    target = made.target or made.source
    models = [*made.sources_before, made.source, target]
    if recipe.prune is not None:
        models += [target] * (1 + len(recipe.evaluation.baselines))
    models += made.family.values()
    flops = None
    if domains is not None:
        tokens = domains * whole_rows(recipe.evaluation.tokens_per_domain, sequence_length=length) * length
        flops = sum(forward_flops_per_token(model, sequence_length=length) * tokens for model in models)
    yield Phase(
        what=f"evaluate: {len(models)} models",
        processes=made.hardware.processes,
        memory=measured(made),
        flops=flops,
        disk=sum(_fp32(model) for model in models),
    )
    together = is_shared_out(recipe, made=made)
    if recipe.evaluation.generation.prompts or (recipe.evaluation.speed and not together):
        yield Phase(
            what="evaluate: what models write" + ", speed" * (recipe.evaluation.speed and not together),
            processes=made.hardware.processes if together else 1,
            memory=judged(recipe, made=made),
            flops=None,  # models write until they end
        )
    if recipe.evaluation.tasks:
        yield Phase(
            what=f"evaluate: tasks, {', '.join(recipe.evaluation.tasks)}",
            processes=made.hardware.processes,
            memory=judged(recipe, made=made)
            if together
            else _fp32(made.first_source) + copies(made.first_source, made=made),
            flops=None,  # questions are of any length
        )


def _flops(cost: Cost, *, made: RunPlan, length: int) -> float:
    return flops_of(cost, made.source, sequence_length=length)


def _share(size: float, *, made: RunPlan) -> int:
    """Bytes of one process, of what all keep of the text that they read."""
    return math.ceil(size / made.hardware.processes)


def _fp32(shape: Shape) -> int:
    return 4 * shape.num_parameters()
