"""From a recipe to the task of one training stage: schedule, objective, engine, mixture rule, held-out losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shearing.data.mixture.dynamic import DynamicMixture, State
from shearing.data.mixture.rules.update import rule_of
from shearing.data.mixture.sampler import Mixture
from shearing.data.recipe import DataRecipe
from shearing.models.anatomy import anatomy_of
from shearing.models.attention import drop_attention_mask, keep_attention_within_documents
from shearing.models.correspondence import Correspondence
from shearing.models.families.experts.products import compute_experts_under_autocast
from shearing.models.shape import Shape, resolve_target
from shearing.objectives.objective import Parts, objective_of
from shearing.runs.context import RunContext
from shearing.runs.continuation.changes import changed_until
from shearing.runs.planning.hardware import peak_flops, teacher_flops_per_token, training_flops_per_token
from shearing.runs.recipe import BatchSplit, Recipe, TrainingStage, split_batch
from shearing.runs.stages.heldout import measure_heldout, steering_tokens, tokens_of_all
from shearing.runs.stages.source_model import load_teacher
from shearing.training.adapters.layers import adapters_by_layer
from shearing.training.callbacks.layer_choice import LayerChoice, LayerChoiceSettings
from shearing.training.callbacks.mask_moves import MaskMoves
from shearing.training.checkpoints.pieces import SavedState
from shearing.training.device import checkpoint_activations, compile_layers
from shearing.training.engines.engine import Engine, EngineParts, engine_of
from shearing.training.engines.moving_masks import MovingMasks
from shearing.training.engines.optimizer import Optimization
from shearing.training.stage import Compute, HeldOut, MaskedTraining, Schedule
from shearing.training.task import Callback, Task
from shearing.training.trackers import Trackers


def task_of(
    context: RunContext,
    *,
    stage: TrainingStage,
    model: PreTrainedModel,
    mixture: Mixture,
    masking: MaskedTraining | None,
    reference: Mapping[str, float],
    rule: State | None = None,
    moments: SavedState | None = None,
    before_first_step: Callable[[], None] | None = None,
    kept: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
    moving: MovingMasks | None = None,
    correspondence: Callable[[], Correspondence] | None = None,
) -> Task:
    """Everything `train` needs; layers are checkpointed and compiled in place as the recipe says.

    Args:
        context: of the run.
        stage: which of its training stages.
        model: Hugging Face model with fp32 weights, masked in place while masks are learned.
        mixture: where the stage's samples start.
        masking: None: the weights alone are trained.
        reference: loss of each domain aimed at; unused with constant domain weights.
        rule: what the rule that updates domain weights remembers of the stage before, `memory` or `excess`.
        moments: AdamW state to start from, under the names of the objective; None: from nothing.
        before_first_step: called by all processes; changes the main process's model in place. Not called where a
            checkpoint is continued.
        kept, moving: masks of a sparse model, that stay or that move; see `Task`.
        correspondence: says what of the source the model has; asked where streams are matched.

    Raises:
        ShearingError: the processes cannot share a batch equally, or an engine that is not installed.
    """
    recipe, processes = context.recipe, context.processes
    settings, data, training = recipe.training_stages[stage], recipe.data, recipe.training
    per_step = settings.tokens_per_step(sequence_length=data.sequence_length)
    split = split_batch(recipe, stage=stage, num_processes=processes.size)
    _attend(model, data=data)
    if anatomy_of(model.config).mlp.experts is not None:
        compute_experts_under_autocast(model)
    if training.activation_checkpointing != "none":
        checkpoint_activations(model, selective=training.activation_checkpointing == "selective")
    if training.compile:
        compile_layers(model)
    optimization = Optimization.of(settings, rates=recipe.learning_rates(stage))
    beside_teacher = recipe.mixture.update != "constant" and recipe.mixture.reference == "teacher"
    return Task(
        name=stage,
        folder=context.directory.folder(stage),
        schedule=Schedule.of(
            settings,
            training=training,
            tokens_per_step=per_step,
            sequence_length=data.sequence_length,
            micro_batch_size=split.micro_batch_size,
            mixture_interval=recipe.mixture.interval if stage == "prune" else recipe.mixture.pretrain_interval,
        ),
        objective=processes.each(
            lambda: objective_of(
                "language_model" if recipe.distill is None else "distillation",
                parts=_parts(
                    context,
                    stage=stage,
                    model=model,
                    height=optimization.rates.height_at,
                    correspondence=correspondence,
                ),
            )
        ),
        engine=_engine(context, optimization=optimization, split=split),
        optimization=optimization,
        mixture=mixture,
        masking=masking,
        dynamic=None
        if recipe.mixture.update == "constant"
        else DynamicMixture(
            rule=rule_of(recipe.mixture, prior=context.initial_weights),
            reference=reference,
            parameters=_final_parameters(recipe, stage=stage, model=model),
            tokens=settings.total_steps(sequence_length=data.sequence_length) * per_step,
            online=recipe.mixture.reference == "online",
            # Losses on the way to the target say nothing of how the cut model learns; what the rule remembers does.
            state=rule or {},
        ),
        heldout=_held_out(
            context,
            stage=stage,
            model=model,
            tokens=steering_tokens(context),
            require_labels=recipe.mixture.update != "constant" and recipe.mixture.losses == "heldout",
        ),
        validation=None
        if (tokens := recipe.validation_tokens(stage, domains=len(context.corpus.domains))) is None
        else _held_out(context, stage=stage, model=model, tokens=tokens, require_labels=False),
        average_weight=recipe.mixture.ema if recipe.mixture.losses == "training" and not beside_teacher else None,
        teacher_reference=beside_teacher,
        moments=moments,
        before_first_step=before_first_step,
        kept=kept,
        moving=moving,
        callbacks=tuple(_callbacks(context, stage=stage, model=model, moving=moving)),
        settled_steps=processes.on_main(lambda: changed_until(context.directory)) if stage == "pretrain" else 0,
        processes=processes,
        compute=_compute(context, shape=Shape.of(model.config)),
        open_trackers=lambda first_step: Trackers.open(
            training.trackers,
            run_name=f"{recipe.name}-{stage}",
            folder=recipe.run_dir / "trackers",
            configuration=recipe.flat(),
            first_step=first_step,
        ),
    )


def _callbacks(
    context: RunContext, *, stage: TrainingStage, model: PreTrainedModel, moving: MovingMasks | None
) -> Iterator[Callback]:
    """What goes on around the steps of a stage beside what goes on around all."""
    if moving is not None:
        yield MaskMoves(moving)
    recipe = context.recipe
    if stage == "pretrain" and (ist := recipe.pretrain.ist) is not None:
        settings = LayerChoiceSettings(
            layers=max(1, round(ist.layers * Shape.of(model.config).num_hidden_layers)),
            interval=max(1, recipe.pretrain.in_steps(ist.interval, sequence_length=recipe.data.sequence_length)),
            pairs=ist.pairs,
            strength=ist.strength,
            rate=ist.rate,
            seed=recipe.seed,
        )
        text = _held_out(context, stage=stage, model=model, tokens=ist.tokens, require_labels=True)
        yield LayerChoice(adapters_by_layer(model), settings=settings, text=text)


def _held_out(
    context: RunContext, *, stage: TrainingStage, model: PreTrainedModel, tokens: int, require_labels: bool
) -> HeldOut:
    """So many validation tokens of each domain, read by all processes together.

    Where nothing follows from a loss, the run goes on though a domain has no label that counts: it is NaN.
    """
    return HeldOut(
        tokens=tokens_of_all(context, tokens=tokens),
        measure=lambda forward, advance: measure_heldout(
            context,
            stage=stage,
            model=model,
            tokens=tokens,
            advance=advance,
            objective=forward,
            processes=context.processes,
            require_labels=require_labels,
        ),
    )


def _attend(model: PreTrainedModel, *, data: DataRecipe) -> None:
    """Makes a model attend as the recipe says, in place, and without mask tensors where that can be."""
    if data.attention == "documents":
        keep_attention_within_documents(model)
    else:
        drop_attention_mask(model, sequence_length=data.sequence_length)


def _parts(
    context: RunContext,
    *,
    stage: TrainingStage,
    model: PreTrainedModel,
    height: Callable[[int], float],
    correspondence: Callable[[], Correspondence] | None,
) -> Parts:
    """What the stage has for its objective."""
    recipe = context.recipe
    hidden = None if recipe.distill is None else recipe.distill.hidden

    def teacher() -> PreTrainedModel:
        whole = load_teacher(context)
        _attend(whole, data=recipe.data)
        if recipe.training.compile and recipe.distill is not None and recipe.distill.placement == "replicate":
            compile_layers(whole)  # compiled code would hold on to weights that come and go
        return whole

    return Parts(
        model=model,
        chunk_tokens=recipe.training.loss_chunk_tokens,
        domains=list(context.corpus.domains),
        distill=recipe.distill,
        cache=context.teacher_cache,
        teacher=teacher,
        height=height,
        correspondence=None if hidden is None or correspondence is None else correspondence(),
        hidden_steps=0
        if hidden is None
        else recipe.training_stages[stage].in_steps(hidden.decay, sequence_length=recipe.data.sequence_length),
    )


def _final_parameters(recipe: Recipe, *, stage: TrainingStage, model: PreTrainedModel) -> int:
    """Size that the model of a stage ends with, embeddings included."""
    if stage == "pretrain":
        return Shape.of(model.config).num_parameters()
    target = recipe.pruning.target
    if target.parameters is not None:
        return target.parameters
    return resolve_target(target, source=model.config).num_parameters()


def _compute(context: RunContext, *, shape: Shape) -> Compute:
    data, peak = context.recipe.data, None
    if context.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(), precision=context.precision)
    # Inside documents attention takes less than over whole rows, how much less depends on the text: it is left out.
    attended = data.sequence_length if data.attention == "full" else 0
    cost = training_flops_per_token(shape, sequence_length=attended)
    cost += teacher_flops_per_token(context.teacher_shape, distill=context.recipe.distill, sequence_length=attended)
    return Compute(flops_per_token=cost, peak_flops=peak)


def _engine(context: RunContext, *, optimization: Optimization, split: BatchSplit) -> Engine:
    training = context.recipe.training
    parts = EngineParts(
        optimization=optimization,
        training=training,
        device=context.device,
        precision=context.precision,
        processes=context.processes,
        micro_batch_size=split.micro_batch_size,
        accumulation=split.accumulation,
    )
    return engine_of(training.engine, parts=parts)
