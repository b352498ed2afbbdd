"""What a run will take on given GPUs, before anything is started: memory, FLOPs, time and disk of the training stages.

Everything follows from the recipe and the source's config; neither weights nor the corpus are read.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
from shearing.pruning.structured.granularities import SIZE_OF, granularities_of
from shearing.runs.names import COMPONENT_NAMES, TEACHER_NAMES
from shearing.runs.planning.disk import checkpoint_bytes, gradient_bytes
from shearing.runs.planning.hardware import GPU, forward_flops_per_token, gpu_of, training_flops_per_token
from shearing.runs.planning.memory import Checkpointing, Layerwise, Listening, Memory, Sharding, Workload, ZeroStage
from shearing.runs.planning.traced_step import StepModel, Taught, measure
from shearing.runs.recipe import Recipe, TrainingStage
from shearing.training.device import resolve_device, resolve_precision
from shearing.training.engines.facts import ENGINES
from shearing.training.stage import PREFETCHED_STEPS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Fit = Literal["yes", "tight", "no", "?"]

USABLE = 0.9
"""Share of a GPU: CUDA's context, the workspaces of libraries and fragmentation want about a tenth."""

_CHECKPOINTING: Sequence[Checkpointing] = ("none", "selective", "full")
ZERO_STAGES: Sequence[ZeroStage] = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What to plan for.

    Attributes:
        processes: one on each GPU.
        name: the GPU as it was named, or "cpu".
        gpu: its row of the table; None if it has none.
        memory: bytes of one GPU; None if unknown.
        mfu: share of the peak that training reaches.
    """

    processes: int
    name: str
    gpu: GPU | None
    memory: int | None
    mfu: float

    @classmethod
    def of(cls, *, processes: int | None, gpu: str | None, gigabytes: float | None, mfu: float) -> Hardware:
        """What the user gave, and for the rest what is here.

        Raises:
            ShearingError: a number that cannot be.
        """
        for field, value, valid, allowed in (
            ("--gpus", processes, processes is None or processes >= 1, "at least 1"),
            ("--memory", gigabytes, gigabytes is None or gigabytes > 0, "more than 0 (GB)"),
            ("--mfu", mfu, 0 < mfu <= 1, "more than 0 and at most 1: 0.4 is usual"),
        ):
            if not valid:
                raise ShearingError(field, value=value, allowed=allowed, mend="correct the value, or leave it out")
        here = torch.cuda.is_available()
        name = gpu or (torch.cuda.get_device_name() if here else "cpu")
        known = gpu_of(name)
        memory = known.memory if known else None
        if gigabytes is not None:
            memory = int(gigabytes * 1e9)
        elif gpu is None and here:
            memory = torch.cuda.get_device_properties(0).total_memory
        return cls(
            processes=processes or max(1, torch.cuda.device_count()), name=name, gpu=known, memory=memory, mfu=mfu
        )

    def fit(self, memory: Memory) -> Fit:
        """Whether a GPU can hold that."""
        if self.memory is None:
            return "?"
        if memory.total <= USABLE * self.memory:
            return "yes"
        return "tight" if memory.total <= self.memory else "no"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The settings that decide what a step holds, beside the micro-batch.

    Attributes:
        zero_stage: DeepSpeed's, or the one that holds what the engine holds; 0: the torch engine.
        checkpointing: `training.activation_checkpointing`.
        offload_optimizer, offload_parameters: whether they are in host memory.
        layerwise: how FSDP2 shares out, where that is the engine.
    """

    zero_stage: ZeroStage
    checkpointing: Checkpointing
    offload_optimizer: bool
    offload_parameters: bool
    layerwise: Layerwise | None

    @classmethod
    def of(cls, recipe: Recipe) -> Choice:
        """The recipe's."""
        training, deepspeed = recipe.training, recipe.training.deepspeed
        holds_as = ENGINES[training.engine].holds_as
        return cls(
            zero_stage=deepspeed.zero_stage if holds_as is None else holds_as,
            checkpointing=training.activation_checkpointing,
            offload_optimizer=deepspeed.offload_optimizer == "cpu",
            offload_parameters=deepspeed.offload_parameters == "cpu",
            layerwise=_layerwise(recipe) if training.engine == "fsdp2" else None,
        )

    def sharding(self, processes: int) -> Sharding:
        """What it shares out among so many processes."""
        return Sharding(
            processes=processes,
            zero_stage=self.zero_stage,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            layerwise=self.layerwise,
        )

    @property
    def offloads(self) -> int:
        """How much of it is in host memory."""
        return int(self.offload_optimizer) + int(self.offload_parameters)

    def shared_by_layers(self, layerwise: Layerwise) -> Choice:
        """The same under FSDP2."""
        return dataclasses.replace(
            self, zero_stage=3, offload_optimizer=False, offload_parameters=False, layerwise=layerwise
        )

    def overrides(self, before: Choice) -> list[str]:
        """What to add to a command to get this choice instead of the one before."""
        changed = []
        if self.layerwise != before.layerwise:
            changed.append("training.fsdp2.sum_gradients=micro_batch")
        if self.zero_stage != before.zero_stage:
            changed += ["training.engine=deepspeed", f"training.deepspeed.zero_stage={self.zero_stage}"]
        if self.checkpointing != before.checkpointing:
            changed.append(f"training.activation_checkpointing={self.checkpointing}")
        if self.offload_optimizer != before.offload_optimizer:
            changed.append("training.deepspeed.offload_optimizer=cpu")
        if self.offload_parameters != before.offload_parameters:
            changed.append("training.deepspeed.offload_parameters=cpu")
        return changed


def _layerwise(recipe: Recipe) -> Layerwise:
    settings = recipe.training.fsdp2
    return Layerwise(reshard=settings.reshard_after_forward, sums_once=settings.sum_gradients == "step")


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one training stage takes.

    Attributes:
        stage: which one.
        model: what computes a step.
        sequences: of a step, over all processes.
        micro_batch_size: the recipe's; a process with fewer sequences of a step has a smaller one.
        steps: optimiser steps.
        tokens: training tokens.
        workload: what one process computes in a step, with the recipe's settings.
        flops: of training.
        heldout_flops: of the held-out losses that the mixture follows; None where the domains are not known.
        teacher_flops: of the model that is listened to.
        seconds: of all; None where the GPU's peak is not known.
        listening: the model that is listened to, as a process holds it; None: there is none.
        processes: that share the work.
        choice: the recipe's.
        layerwise: how FSDP2 would share out.
        disk: bytes of all checkpoints that are there at the same time.
    """

    stage: TrainingStage
    model: StepModel
    sequences: int
    micro_batch_size: int
    steps: int
    tokens: int
    workload: Workload
    flops: float
    heldout_flops: float | None
    teacher_flops: float
    seconds: float | None
    listening: Listening | None
    processes: int
    choice: Choice
    layerwise: Layerwise
    disk: int

    @property
    def shape(self) -> Shape:
        """Of the model it trains."""
        return self.model.shape

    def held(self, choice: Choice) -> Memory:
        """Peak of one process under a choice, otherwise with the recipe's settings."""
        workload = dataclasses.replace(self.workload, checkpointing=choice.checkpointing)
        return measure(
            self.model, workload=workload, sharding=choice.sharding(self.processes), listening=self.listening
        )

    def under_zero(self, zero_stage: ZeroStage) -> Memory:
        """Peak of one process under a stage of ZeRO; 0: under the torch engine."""
        return self.held(dataclasses.replace(self.choice, layerwise=None, zero_stage=zero_stage))

    def under_fsdp2(self) -> Memory:
        """Peak of one process under FSDP2."""
        return self.held(self.choice.shared_by_layers(self.layerwise))


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
        budget: parameters to reach, where the recipe gives them instead of sizes.
        vocab_size: tokens that the final model keeps; `auto` those that the corpus uses, None all.
        choice: the recipe's.
        within_documents: tokens attend to their own document alone; FLOPs are counted as if to their whole row.
        adapters: only they are trained in the end; figures are those of training all weights.
        one_shot: weights are zeroed in between, which no other figure here is of.
        spooled: bytes of disk that this needs beside the model, for gradients.
        stages: the training stages in order.
        advice: what to change, where the recipe's choice does not fit.
    """

    name: str
    hardware: Hardware
    precision: torch.dtype
    source: Shape
    teacher: Shape | None
    target: Shape | None
    budget: int | None
    vocab_size: int | str | None
    choice: Choice
    within_documents: bool
    adapters: bool
    one_shot: bool
    spooled: int
    stages: Sequence[StagePlan]
    advice: str | None


@named(COMPONENT_NAMES)
def plan(recipe: Recipe, *, hardware: Hardware, stages: Collection[str] | None = None) -> RunPlan:
    """What a recipe takes on given hardware.

    Args:
        recipe: of the run.
        hardware: on what.
        stages: of its training stages, those to plan; None: all.

    Raises:
        ShearingError: no config of the source model, a target it cannot become, or processes that cannot share a batch.
    """
    stored = load_config(recipe.model.source, revision=recipe.model.revision)
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
    precision = _precision(recipe, hardware=hardware)
    taught = _taught(recipe, source=stored, precision=precision)
    planned = [
        _stage_plan(
            recipe,
            stage=stage,
            model=StepModel(
                config=configs[stage],
                attention=recipe.model.attn_implementation,
                granularities=_masked(recipe, source=source, target=None if budget else target)
                if stage == "prune"
                else (),
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
        teacher=None if taught is None else Shape.of(taught.config),
        target=target,
        budget=budget,
        vocab_size=None if recipe.target is None else recipe.target.vocab_size,
        choice=choice,
        within_documents=recipe.data.attention == "documents",
        adapters=recipe.pretrain.adapters is not None,
        one_shot=recipe.sparsify is not None,
        spooled=gradient_bytes(recipe, shape=target or source),
        stages=planned,
        advice=_advice(planned, choice=choice, hardware=hardware),
    )


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
        tokens = _heldout_tokens(recipe, stage=stage, steps=steps)
        shares[stage] = None if tokens is None or not steps else tokens / (3 * steps * per_step)
    return shares


def _masked(recipe: Recipe, *, source: Shape, target: Shape | None) -> tuple[str, ...]:
    """Granularities that masks act on, of those that have something to prune."""
    chosen = granularities_of(recipe.pruning.prune.granularities, source=source, target=None)
    return tuple(each.name for each in chosen if target is None or getattr(target, SIZE_OF[each.name]) < each.units)


def _taught(recipe: Recipe, *, source: PretrainedConfig, precision: torch.dtype) -> Taught | None:
    """The teacher that every process runs; None: there is none, or what it says is read from a cache."""
    distill, teacher = recipe.distill, recipe.teacher
    if distill is None or teacher is None or not recipe.listens_online:
        return None
    config = source
    if teacher != recipe.model:
        with named(TEACHER_NAMES):
            config = load_config(teacher.source, revision=teacher.revision)
    return Taught(config=config, distill=distill, dtype=teacher_precision(distill, products=precision))


def _listening(model: StepModel) -> Listening | None:
    """What a process holds of the teacher of a stage's model."""
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


def _precision(recipe: Recipe, *, hardware: Hardware) -> torch.dtype:
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
    settings, shape, listening = recipe.training_stages[stage], model.shape, _listening(model)
    length = recipe.data.sequence_length
    steps, per_step = settings.total_steps(sequence_length=length), settings.tokens_per_step(sequence_length=length)
    sequences = per_step // length
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
    heldout = _heldout_tokens(recipe, stage=stage, steps=steps)
    heldout_flops = None if heldout is None else forward_flops_per_token(shape, sequence_length=length) * heldout
    teacher_flops = 0.0 if listening is None else _teacher_flops_per_token(recipe, shape=listening.shape)
    teacher_flops *= steps * per_step
    peak = None if hardware.gpu is None else hardware.gpu.peak.get(precision)
    speed = None if peak is None else peak * hardware.mfu * hardware.processes
    workload = _workload(
        Workload(
            micro_batch_size=settings.micro_batch_size,
            micro_batches=1,
            sequence_length=length,
            bf16=precision == torch.bfloat16,
            checkpointing=recipe.training.activation_checkpointing,
            chunk_tokens=recipe.training.loss_chunk_tokens,
            masked=stage == "prune",
            eager_attention=is_eager(shape.family, attn_implementation=recipe.model.attn_implementation),
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
        teacher_flops=teacher_flops,
        seconds=None if speed is None else (flops + (heldout_flops or 0.0) + teacher_flops) / speed,
        listening=listening,
        processes=hardware.processes,
        choice=Choice.of(recipe),
        layerwise=_layerwise(recipe),
        disk=checkpoint_bytes(settings, sequence_length=length, parameters=shape.num_parameters()),
    )


def _teacher_flops_per_token(recipe: Recipe, *, shape: Shape) -> float:
    """Of a forward pass; its head is multiplied twice where tokens are chosen by their entropy before the loss."""
    assert recipe.distill is not None
    again = 2.0 * shape.vocab_size * shape.hidden_size if recipe.distill.skip_low_entropy else 0.0
    return forward_flops_per_token(shape, sequence_length=recipe.data.sequence_length) + again


def _workload(workload: Workload, *, sequences: int, processes: int, micro_batch_size: int) -> Workload:
    """The workload of one of so many processes at another micro-batch."""
    own = sequences // processes
    size = min(micro_batch_size, own)
    return dataclasses.replace(workload, micro_batch_size=size, micro_batches=-(-own // size))


def _heldout_tokens(recipe: Recipe, *, stage: TrainingStage, steps: int) -> int | None:
    """Tokens read for held-out losses: at each update of the mixture or every now and then, and of pruning also at the
    start and the end.

    None where nothing says how many domains there are.
    """
    mixture, length = recipe.mixture, recipe.data.sequence_length
    domains, settings = num_domains(recipe), recipe.training_stages[stage]
    if domains is None:
        return None
    updates = 0
    if mixture.update != "constant":
        interval = mixture.interval if stage == "prune" else mixture.pretrain_interval
        every = max(1, recipe.training_stages[stage].in_steps(interval, sequence_length=length))
        updates = max(0, steps - PREFETCHED_STEPS - 1) // every if mixture.losses == "heldout" else 0
        updates += int(stage == "prune" and mixture.reference in ("source", "online"))
    each = {recipe.heldout_tokens(domains=domains): updates + int(stage == "prune")}
    looked_at = recipe.validation_tokens(stage, domains=domains)
    if looked_at is not None and settings.validation_interval is not None:
        every = max(1, settings.in_steps(settings.validation_interval, sequence_length=length))
        each[looked_at] = each.get(looked_at, 0) + steps // every
    rows = sum(readings * whole_rows(tokens, sequence_length=length) for tokens, readings in each.items())
    return domains * rows * length


def num_domains(recipe: Recipe) -> int | None:
    """How many domains a recipe trains on; None where neither it nor the corpus, which need not be there, says so."""
    for given in (recipe.data.domains, recipe.mixture.initial_weights):
        if isinstance(given, (list, dict)):
            return len(given)
    return len(list(recipe.data.corpus.glob(f"*/{MANIFEST_NAME}"))) or None


def _advice(stages: Sequence[StagePlan], *, choice: Choice, hardware: Hardware) -> str | None:
    """The smallest change with which all stages fit, where they do not; None where nothing is to be said."""
    unfit = [stage.stage for stage in stages if hardware.fit(stage.held(choice)) == "no"]
    if not unfit:
        return None
    start = f"{' and '.join(unfit)} will not fit"
    ways = _ways(stages, choice=choice, hardware=hardware)
    if ways is not None:
        return f"{start}; this would: {' and '.join(ways)}"
    return f"{start}, whatever is shared out, offloaded or recomputed: it takes GPUs with more memory"


def what_would_fit(plan: RunPlan) -> list[str] | None:
    """Overrides, and the number of GPUs if it has to be another, with which all stages fit; None if nothing helps."""
    return _ways(plan.stages, choice=plan.choice, hardware=plan.hardware)


def _ways(stages: Sequence[StagePlan], *, choice: Choice, hardware: Hardware) -> list[str] | None:
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
        workload = _workload(
            dataclasses.replace(stage.workload, checkpointing=choice.checkpointing),
            sequences=stage.sequences,
            processes=hardware.processes,
            micro_batch_size=size,
        )
        sharding = choice.sharding(hardware.processes)
        memory = measure(stage.model, workload=workload, sharding=sharding, listening=stage.listening)
        if hardware.fit(memory) == "yes":
            return size
    return None
