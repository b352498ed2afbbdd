"""What a run will take on given GPUs, before anything is started: memory, FLOPs, time and disk of the training stages.

Everything follows from the recipe and the source's config; neither weights nor the corpus are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from shearing.data.corpus.corpus import whole_rows
from shearing.data.corpus.format import MANIFEST_NAME
from shearing.errors import ShearingError, named
from shearing.models.attention import is_eager
from shearing.models.loading import load_config
from shearing.models.shape import Shape, config_for, resolve_target
from shearing.objectives.recipe import DistillRecipe
from shearing.objectives.registry import DIVERGENCES
from shearing.objectives.teacher import teacher_precision
from shearing.pruning.rotation.tied import config_as_cut
from shearing.pruning.sparse.job import Working
from shearing.pruning.structured.granularities import SIZE_OF, granularities_of
from shearing.pruning.structured.rounding import every_granularity
from shearing.runs.continuation.cascade import cascade_of, require_shrinking
from shearing.runs.continuation.family import family_shapes
from shearing.runs.names import COMPONENT_NAMES, TEACHER_NAMES
from shearing.runs.planning.advice import advice_for, least_changes
from shearing.runs.planning.disk import checkpoint_bytes, moving_weights, refitted_bytes, rotated_bytes, working_of
from shearing.runs.planning.hardware import (
    Hardware,
    forward_flops_per_token,
    teacher_flops_per_token,
    training_flops_per_token,
)
from shearing.runs.planning.memory import Listening, Workload
from shearing.runs.planning.step.stage_plan import Choice, StagePlan, layerwise_of, workload_at
from shearing.runs.planning.step.traced_step import StepModel, Taught
from shearing.runs.recipe import Recipe, TrainingStage, overridden
from shearing.training.device import resolve_device, resolve_precision
from shearing.training.stage import PREFETCHED_STEPS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run takes.

    Attributes:
        name: of the run.
        hardware: on what.
        precision: dtype of matrix products.
        teacher: shape of the model that is listened to; None: there is none.
        source, target: shapes; the target is a stand-in where the recipe gives a budget alone, and None where no units
            are pruned.
        learned: whether the source's sizes are, by the run before; they are at most those that stand here.
        budget: parameters to reach, where the recipe gives them instead of sizes.
        family: shapes of the smaller sizes that are trained inside the last, by name.
        vocab_size: tokens that the final model keeps; `auto` those that the corpus uses, None all.
        choice: the recipe's.
        within_documents: tokens attend to their own document alone; FLOPs are counted as if to their whole row.
        adapters: only they are trained in the end; figures are those of training all weights.
        one_shot: weights are zeroed in between, which no other figure here is of.
        one_shot_whole: that loads the model whole, as levels that go by losses need.
        working: bytes of disk that this needs beside its models while it is at work.
        rotated: bytes of disk that the source in another basis takes until mask learning is complete.
        refitted: bytes of disk that refitted layers take until training begins; at most.
        stages: the training stages in order.
        advice: what to change, where the recipe's choice does not fit.
        sources_before: of a cascade's run, those of the runs before it in order: evaluation measures them too.
    """

    name: str
    hardware: Hardware
    precision: torch.dtype
    source: Shape
    learned: bool
    teacher: Shape | None
    target: Shape | None
    budget: int | None
    family: Mapping[str, Shape]
    vocab_size: int | str | None
    choice: Choice
    within_documents: bool
    adapters: bool
    one_shot: bool
    one_shot_whole: bool
    working: Working
    rotated: int
    refitted: int
    stages: Sequence[StagePlan]
    advice: str | None
    sources_before: Sequence[Shape] = ()

    @property
    def first_source(self) -> Shape:
        """What evaluation compares with."""
        return next(iter(self.sources_before), self.source)


def plan(recipe: Recipe, *, hardware: Hardware, stages: Collection[str] | None = None) -> RunPlan:
    """What a recipe takes on given hardware; of a cascade, what its first run takes: see `plans`.

    Args:
        recipe: of the run.
        hardware: on what.
        stages: of its training stages, those to plan; None: all.

    Raises:
        ShearingError: no config of the source model, a target it cannot become, or processes that cannot share a batch.
    """
    (_, made), *_ = plans(recipe, hardware=hardware, stages=stages)
    return made


@named(COMPONENT_NAMES)
def plans(recipe: Recipe, *, hardware: Hardware, stages: Collection[str] | None = None) -> list[tuple[Recipe, RunPlan]]:
    """The runs of a recipe in order, with what each takes; one without a cascade is one run.

    What a run starts from is what the one before has been cut to. Where that is a budget, whose sizes are learned, it
    is what that was cut from, which is larger.

    Args:
        recipe, hardware, stages: see `plan`.

    Raises:
        ShearingError: see `plan`; a target that does not shrink.
    """
    config, learned = load_config(recipe.model.source, revision=recipe.model.revision), False
    require_shrinking(recipe, source=config_as_cut(config, prune=recipe.prune))
    made: list[tuple[Recipe, RunPlan]] = []
    for each in cascade_of(recipe):
        planned = _plan(each, stored=config, learned=learned, hardware=hardware, stages=stages)
        made.append((each, dataclasses.replace(planned, sources_before=[before.source for _, before in made])))
        config, target = config_as_cut(config, prune=each.prune), planned.target
        learned = learned or planned.budget is not None
        if target is not None and planned.budget is None:
            config = config_for(config, shape=target, attention_layers=range(target.num_hidden_layers))
    return made


def _plan(
    recipe: Recipe, *, stored: PretrainedConfig, learned: bool, hardware: Hardware, stages: Collection[str] | None
) -> RunPlan:
    """What one run takes, from a source with that config, whose sizes may be learned before it."""
    config = config_as_cut(stored, prune=recipe.prune)
    source = Shape.of(config)
    target, budget = None, None
    if recipe.target is not None:
        budget = recipe.target.parameters
        target = (
            resolve_target(recipe.target, source=config) if budget is None else _stand_in(source, parameters=budget)
        )
    trained = config
    if target is not None:
        trained = config_for(config, shape=target, attention_layers=range(target.num_hidden_layers))
    configs: dict[TrainingStage, PretrainedConfig] = {"prune": config, "pretrain": trained}
    family = family_shapes(recipe, source=config)
    masked: dict[TrainingStage, tuple[str, ...]] = {
        "prune": () if recipe.prune is None else _masked(recipe, source=source, target=None if budget else target),
        "pretrain": _shrinking(list(family.values())[-1], source=target or source) if family else (),
    }
    precision = planned_precision(recipe, hardware=hardware)
    taught = _taught(recipe, source=stored, precision=precision)
    planned = [
        _stage_plan(
            recipe,
            stage=stage,
            model=StepModel(
                config=configs[stage],
                attention=recipe.model.attn_implementation,
                granularities=masked[stage],
                taught=taught,
            ),
            hardware=hardware,
            precision=precision,
        )
        for stage in recipe.training_stages
        if stages is None or stage in stages
    ]
    choice = Choice.of(recipe)
    return RunPlan(
        name=recipe.name,
        hardware=hardware,
        precision=precision,
        source=source,
        learned=learned,
        teacher=None if taught is None else Shape.of(taught.config),
        target=target,
        budget=budget,
        family=family,
        vocab_size=None if recipe.target is None else recipe.target.vocab_size,
        choice=choice,
        within_documents=recipe.data.attention == "documents",
        adapters=recipe.pretrain.adapters is not None,
        one_shot=recipe.sparsify is not None,
        one_shot_whole=recipe.sparsify is not None and recipe.sparsify.allocation_reads_loss,
        working=working_of(recipe, shape=target or source),
        rotated=rotated_bytes(recipe, source=source),
        refitted=refitted_bytes(recipe, source=source),
        stages=planned,
        advice=advice_for(planned, choice=choice, hardware=hardware, accepts=partial(_accepts, recipe)),
    )


def _accepts(recipe: Recipe, overrides: Sequence[str]) -> bool:
    """Whether a recipe takes overrides."""
    try:
        overridden(recipe, overrides=overrides)
    except ShearingError:
        return False
    return True


def heldout_shares(recipe: Recipe) -> dict[TrainingStage, float | None]:
    """FLOPs of the held-out losses that the mixture follows, as a share of each stage's training FLOPs; None: unknown.

    A forward pass takes a third of a training step's FLOPs per token, whatever the model.

    Args:
        recipe: of the run.

    Raises:
        ShearingError: a batch in tokens that is no whole number of sequences.
    """
    shares: dict[TrainingStage, float | None] = {}
    for stage, settings in recipe.training_stages.items():
        length = recipe.data.sequence_length
        steps, per_step = settings.total_steps(sequence_length=length), settings.tokens_per_step(sequence_length=length)
        tokens = _heldout_tokens(recipe, stage=stage)
        shares[stage] = None if tokens is None or not steps else tokens / (3 * steps * per_step)
    return shares


def _masked(recipe: Recipe, *, source: Shape, target: Shape | None) -> tuple[str, ...]:
    """Granularities that masks act on, of those that have something to prune."""
    chosen = granularities_of(recipe.pruning.prune.granularities, source=source, target=None)
    return tuple(each.name for each in chosen if target is None or getattr(target, SIZE_OF[each.name]) < each.units)


def _shrinking(smallest: Shape, *, source: Shape) -> tuple[str, ...]:
    """Granularities that masks of a family act on."""
    chosen = granularities_of(every_granularity(source), source=source, target=smallest)
    return tuple(each.name for each in chosen)


def _taught(recipe: Recipe, *, source: PretrainedConfig, precision: torch.dtype) -> Taught | None:
    """The teacher that every process runs; None: there is none, or what it says is read from a cache."""
    distill, teacher = recipe.distill, recipe.teacher
    if distill is None or teacher is None or not recipe.listens_online:
        return None
    config = source
    if teacher != recipe.model:
        with named(TEACHER_NAMES):
            config = load_config(teacher.source, revision=teacher.revision)
    return Taught(config=config, distill=distill, dtype=teacher_precision(distill.precision, products=precision))


def _listening(model: StepModel, *, processes: int) -> Listening | None:
    """What one of so many processes holds of the teacher of a stage's model."""
    taught = model.taught
    if taught is None:
        return None
    distill = taught.distill
    return Listening(
        shape=Shape.of(taught.config),
        bf16=taught.dtype == torch.bfloat16,
        buffers=1 + DIVERGENCES[distill.kind].buffers + int(distill.temperature != 1),
        matched_layers=_matched_layers(distill, shape=model.shape),
        offloaded=distill.placement == "offload",
        shared_by=processes if distill.placement == "shard" else None,
    )


def _matched_layers(distill: DistillRecipe, *, shape: Shape) -> int:
    """Layers behind which a model of this shape is compared with its teacher; at most, of some that are named."""
    hidden = distill.hidden
    if hidden is None:
        return 0
    named_layers = shape.num_hidden_layers if isinstance(hidden.layers, str) else len(set(hidden.layers))
    return min(named_layers, shape.num_hidden_layers)


def _stand_in(source: Shape, *, parameters: int) -> Shape:
    """A shape of about so many parameters, for what a budget leaves open: the source with fewer layers."""
    fixed = source.num_parameters() - source.num_hidden_layers * sum(source.layer_parameters())
    layers = (parameters - fixed) // sum(source.layer_parameters())
    return dataclasses.replace(source, num_hidden_layers=min(max(layers, 1), source.num_hidden_layers))


def planned_precision(recipe: Recipe, *, hardware: Hardware) -> torch.dtype:
    """Dtype of products on the hardware that is planned for, whatever is here."""
    training = recipe.training
    if training.precision == "auto" and (hardware.gpu is not None or training.device == "cuda"):
        # For the GPU that is planned for, not for what is here; one that is not in the table has bf16, as all newer do.
        return torch.bfloat16 if hardware.gpu is None or torch.bfloat16 in hardware.gpu.peak else torch.float32
    device = resolve_device(training.device) if training.precision == "auto" else torch.device("cpu")
    return resolve_precision(training, device=device)


def _stage_plan(
    recipe: Recipe,
    *,
    stage: TrainingStage,
    model: StepModel,
    hardware: Hardware,
    precision: torch.dtype,
) -> StagePlan:
    settings, shape, listening = (
        recipe.training_stages[stage],
        model.shape,
        _listening(model, processes=hardware.processes),
    )
    length = recipe.data.sequence_length
    steps, per_step = settings.total_steps(sequence_length=length), settings.tokens_per_step(sequence_length=length)
    # Where nothing is dealt nothing has to be shared: then what a process reads at once.
    sequences = per_step // length if steps else settings.micro_batch_size * hardware.processes
    if sequences % hardware.processes:
        fitting = [count for count in range(1, sequences + 1) if sequences % count == 0]
        nearest = min(fitting, key=lambda count: abs(count - hardware.processes))
        raise ShearingError(
            "--gpus",
            value=hardware.processes,
            allowed=f"what shares the {sequences} sequences of {stage}.batch_size equally: {fitting}",
            mend=f"plan for {nearest}, or set another {stage}.batch_size",
        )
    flops = training_flops_per_token(shape, sequence_length=length) * steps * per_step
    heldout = _heldout_tokens(recipe, stage=stage)
    forward = forward_flops_per_token(shape, sequence_length=length)
    heldout_flops = None if heldout is None else forward * heldout
    teacher = None if listening is None else listening.shape
    teacher_flops = teacher_flops_per_token(teacher, distill=recipe.distill, sequence_length=length) * steps * per_step
    peak = None if hardware.gpu is None else hardware.gpu.peak.get(precision)
    speed = None if peak is None else peak * hardware.mfu * hardware.processes
    moving = moving_weights(recipe, shape=shape) if stage == "pretrain" else 0
    workload = workload_at(
        Workload(
            micro_batch_size=settings.micro_batch_size,
            micro_batches=1,
            sequence_length=length,
            bf16=precision == torch.bfloat16,
            checkpointing=recipe.training.activation_checkpointing,
            chunk_tokens=recipe.training.loss_chunk_tokens,
            masked=stage == "prune" or recipe.family is not None,
            eager_attention=is_eager(shape.family, attn_implementation=recipe.model.attn_implementation),
            moving=moving,
            staged=recipe.training.checkpoint_writing == "background",
        ),
        sequences=sequences,
        processes=hardware.processes,
        micro_batch_size=settings.micro_batch_size,
    )
    return StagePlan(
        stage=stage,
        model=model,
        sequences=sequences,
        micro_batch_size=settings.micro_batch_size,
        steps=steps,
        tokens=steps * per_step,
        workload=workload,
        flops=flops,
        heldout_flops=heldout_flops,
        reference_flops=forward * _reference_tokens(recipe, stage=stage),
        teacher_flops=teacher_flops,
        seconds=None if speed is None else (flops + (heldout_flops or 0.0) + teacher_flops) / speed,
        listening=listening,
        processes=hardware.processes,
        choice=Choice.of(recipe),
        layerwise=layerwise_of(recipe),
        disk=checkpoint_bytes(settings, sequence_length=length, parameters=shape.num_parameters(), moving=moving),
    )


def _heldout_tokens(recipe: Recipe, *, stage: TrainingStage) -> int | None:
    """Tokens read for held-out losses: at each update of the mixture or every now and then, of pruning also at the end,
    and of the first stage for the reference.

    None where nothing says how many domains there are.
    """
    length, domains = recipe.data.sequence_length, num_domains(recipe)
    if domains is None:
        return None
    each = {recipe.heldout_tokens(domains=domains): heldout_updates(recipe, stage=stage) + int(stage == "prune")}
    looked_at = recipe.validation_tokens(stage, domains=domains)
    if looked_at is not None:
        each[looked_at] = each.get(looked_at, 0) + validations(recipe, stage=stage)
    rows = sum(readings * whole_rows(tokens, sequence_length=length) for tokens, readings in each.items())
    return domains * rows * length + _reference_tokens(recipe, stage=stage)


def heldout_updates(recipe: Recipe, *, stage: TrainingStage) -> int:
    """How often a stage reads held-out losses for an update of the domain weights."""
    mixture, settings, length = recipe.mixture, recipe.training_stages[stage], recipe.data.sequence_length
    if mixture.update == "constant" or mixture.losses != "heldout":
        return 0
    interval = mixture.interval if stage == "prune" else mixture.pretrain_interval
    every = max(1, settings.in_steps(interval, sequence_length=length))
    return max(0, settings.total_steps(sequence_length=length) - PREFETCHED_STEPS - 1) // every


def validations(recipe: Recipe, *, stage: TrainingStage) -> int:
    """How often a stage reads validation losses that nothing follows."""
    settings, length = recipe.training_stages[stage], recipe.data.sequence_length
    if settings.validation_interval is None or recipe.validation_tokens(stage, domains=1) is None:
        return 0
    every = max(1, settings.in_steps(settings.validation_interval, sequence_length=length))
    # Of pruning the end is measured anyway.
    return max(0, settings.total_steps(sequence_length=length) - int(stage == "prune")) // every


def reads_reference(recipe: Recipe, *, stage: TrainingStage) -> bool:
    """Whether the source's own losses, which domain weights are compared with, are measured before that stage."""
    first, mixture = next(iter(recipe.training_stages)), recipe.mixture
    return stage == first and mixture.update != "constant" and mixture.reference in ("source", "online")


def _reference_tokens(recipe: Recipe, *, stage: TrainingStage) -> int:
    """Validation tokens that the source reads for its own losses; 0 where nothing says how many domains there are."""
    domains, length = num_domains(recipe), recipe.data.sequence_length
    if domains is None or not reads_reference(recipe, stage=stage):
        return 0
    return domains * whole_rows(recipe.heldout_tokens(domains=domains), sequence_length=length) * length


def num_domains(recipe: Recipe) -> int | None:
    """How many domains a recipe trains on; None where neither it nor the corpus, which need not be there, says so."""
    for given in (recipe.data.domains, recipe.mixture.initial_weights):
        if isinstance(given, (list, dict)):
            return len(given)
    return len(list(recipe.data.corpus.glob(f"*/{MANIFEST_NAME}"))) or None


def what_would_fit(recipe: Recipe, *, made: RunPlan) -> list[str] | None:
    """Overrides, and the number of GPUs if it has to be another, with which all stages fit; None if nothing helps.

    Args:
        recipe: of the run, which takes them.
        made: its plan.
    """
    return least_changes(made.stages, choice=made.choice, hardware=made.hardware, accepts=partial(_accepts, recipe))
