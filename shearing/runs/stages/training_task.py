"""From a recipe to the task of one training stage: corpus, mixture, held-out losses, schedule, engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.data.documents import DocumentRules, Documents, Inputs
from shearing.data.mixture.dynamic import DynamicMixture
from shearing.data.mixture.rules.update import rule_of
from shearing.data.mixture.sampler import Mixture
from shearing.data.mixture.weights import resolve_weights
from shearing.evaluation.heldout_loss import heldout_loss
from shearing.models.attention import drop_attention_mask, keep_attention_within_documents
from shearing.models.loading import load_source
from shearing.models.shape import Shape, resolve_target
from shearing.objectives.objective import Parts
from shearing.objectives.registry import objective_of
from shearing.processes.processes import Processes
from shearing.runs.planning.hardware import peak_flops, training_flops_per_token
from shearing.runs.recipe import BatchSplit, Recipe, TrainingStage, split_batch, tokens_per_step
from shearing.runs.run_directory import RunDirectory
from shearing.training.checkpoints.pieces import SavedState
from shearing.training.device import checkpoint_activations, compile_layers, resolve_device, resolve_precision
from shearing.training.engines.engine import Engine
from shearing.training.engines.optimizer import Optimization
from shearing.training.engines.torch_engine import TorchEngine
from shearing.training.stage import Compute, HeldOut, MaskedTraining, Schedule
from shearing.training.task import Task
from shearing.training.trackers import Trackers


def task_of(
    recipe: Recipe,
    *,
    stage: TrainingStage,
    model: PreTrainedModel,
    mixture: Mixture,
    masking: MaskedTraining | None,
    reference: Mapping[str, float],
    processes: Processes,
    rule_memory: Mapping[str, float] | None = None,
    moments: SavedState | None = None,
    before_first_step: Callable[[], None] | None = None,
    kept: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
) -> Task:
    """Everything `train` needs; layers are checkpointed and compiled in place as the recipe says.

    Args:
        recipe: what to do.
        stage: which of its training stages.
        model: Hugging Face model with fp32 weights, masked in place while masks are learned.
        mixture: where the stage's samples start.
        masking: None: the weights alone are trained.
        reference: loss of each domain aimed at; unused with constant domain weights.
        processes: those of the run.
        rule_memory: what the rule that updates domain weights remembers of the stage before.
        moments: AdamW state to start from, under the names of `LanguageModelLoss`; None: from nothing.
        before_first_step: changes the main process's model in place; not called where a checkpoint is continued.
        kept: masks of a sparse model, whose zeros stay; see `Task`.

    Raises:
        ShearingError: the processes cannot share a batch equally, or an engine that is not installed.
    """
    settings, data, training = recipe.training_stages[stage], recipe.data, recipe.training
    per_step = tokens_per_step(settings, data=data)
    split = split_batch(recipe, stage=stage, num_processes=processes.size)
    if data.attention == "documents":
        keep_attention_within_documents(model)
    else:
        drop_attention_mask(model, sequence_length=data.sequence_length)
    if training.activation_checkpointing != "none":
        checkpoint_activations(model, selective=training.activation_checkpointing == "selective")
    if training.compile:
        compile_layers(model)
    optimization = Optimization.of(settings, tokens_per_step=per_step)
    return Task(
        name=stage,
        folder=RunDirectory(recipe.run_dir).folder(stage),
        schedule=Schedule.of(
            settings,
            training=training,
            tokens_per_step=per_step,
            sequence_length=data.sequence_length,
            micro_batch_size=split.micro_batch_size,
            mixture_interval=recipe.mixture.interval if stage == "prune" else recipe.mixture.pretrain_interval,
        ),
        objective=objective_of("language_model", parts=_parts(recipe, model=model)),
        engine=_engine(recipe, optimization=optimization, split=split, processes=processes),
        optimization=optimization,
        mixture=mixture,
        masking=masking,
        dynamic=None
        if recipe.mixture.update == "constant"
        else DynamicMixture(
            rule=rule_of(recipe.mixture, prior=initial_weights(recipe, corpus=mixture.corpus)),
            reference=reference,
            parameters=_final_parameters(recipe, stage=stage, model=model),
            tokens=optimization.total_steps * per_step,
            online=recipe.mixture.reference == "online",
            # Losses on the way to the target say nothing of how the cut model learns; what the rule remembers does.
            state={"memory": rule_memory or {}},
        ),
        heldout=HeldOut(
            tokens=heldout_tokens(recipe, corpus=mixture.corpus),
            measure=lambda forward, advance: measure_heldout(
                recipe,
                stage=stage,
                model=model,
                corpus=mixture.corpus,
                advance=advance,
                objective=forward,
                processes=processes,
            ),
        ),
        average_weight=recipe.mixture.ema if recipe.mixture.losses == "training" else None,
        moments=moments,
        before_first_step=before_first_step,
        kept=kept,
        processes=processes,
        compute=_compute(recipe, shape=Shape.of(model.config)),
        open_trackers=lambda first_step: Trackers.open(
            training.trackers,
            run_name=f"{recipe.name}-{stage}",
            folder=recipe.run_dir / "trackers",
            configuration=recipe.flat(),
            first_step=first_step,
        ),
    )


def _parts(recipe: Recipe, *, model: PreTrainedModel) -> Parts:
    """What the stage has for its objective."""
    return Parts(
        model=model,
        chunk_tokens=recipe.training.loss_chunk_tokens,
        source=lambda: load_source(
            recipe.model.source,
            revision=recipe.model.revision,
            attn_implementation=recipe.model.attn_implementation,
            device=resolve_device(recipe.training),
            dtype=torch.float32,
        ),
    )


def _final_parameters(recipe: Recipe, *, stage: TrainingStage, model: PreTrainedModel) -> int:
    """Size that the model of a stage ends with, embeddings included."""
    if stage == "pretrain":
        return Shape.of(model.config).num_parameters()
    target = recipe.pruning.target
    if target.parameters is not None:
        return target.parameters
    return resolve_target(target, source=model.config).num_parameters()


def _compute(recipe: Recipe, *, shape: Shape) -> Compute:
    device = resolve_device(recipe.training)
    peak = None
    if device.type == "cuda":
        precision = resolve_precision(recipe.training, device=device)
        peak = peak_flops(torch.cuda.get_device_name(), precision=precision)
    # Inside documents attention takes less than over whole rows, how much less depends on the text: it is left out.
    attended = recipe.data.sequence_length if recipe.data.attention == "full" else 0
    cost = training_flops_per_token(shape, sequence_length=attended)
    return Compute(flops_per_token=cost, peak_flops=peak)


def _engine(recipe: Recipe, *, optimization: Optimization, split: BatchSplit, processes: Processes) -> Engine:
    device = resolve_device(recipe.training)
    precision = resolve_precision(recipe.training, device=device)
    if recipe.training.engine == "torch":
        return TorchEngine(optimization, device=device, precision=precision, processes=processes)
    from shearing.training.engines.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(
        optimization,
        settings=recipe.training.deepspeed,
        device=device,
        precision=precision,
        processes=processes,
        micro_batch_size=split.micro_batch_size,
        accumulation=split.accumulation,
    )


def open_corpus(recipe: Recipe, *, vocab_size: int) -> Corpus:
    """The corpus of a recipe, checked against the source model's tokenizer.

    Raises:
        ShearingError: see `Corpus.open`.
    """
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.source, revision=recipe.model.revision)
    return Corpus.open(
        recipe.data.corpus,
        domains=recipe.data.domains,
        vocab_size=vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        sequence_length=recipe.data.sequence_length,
    )


def initial_mixture(recipe: Recipe, *, corpus: Corpus) -> Mixture:
    """The mixture from its first sample on, at the recipe's starting weights."""
    return Mixture(
        corpus,
        seed=recipe.seed,
        sequence_length=recipe.data.sequence_length,
        weights=initial_weights(recipe, corpus=corpus),
        documents=document_rules(recipe),
    )


def document_rules(recipe: Recipe) -> DocumentRules:
    """What the end of a document means in this recipe."""
    return DocumentRules(
        attention_within=recipe.data.attention == "documents", loss_across=recipe.data.loss_across_documents
    )


def initial_weights(recipe: Recipe, *, corpus: Corpus) -> dict[str, float]:
    """The recipe's starting weights, summing to 1, in the order of the corpus."""
    tokens = {domain: corpus.manifests[domain].train.tokens for domain in corpus.domains}
    return resolve_weights(recipe.mixture.initial_weights, tokens=tokens)


def calibration_batches(
    recipe: Recipe, *, corpus: Corpus, micro_batch_size: int, advance: Callable[[int], None] = lambda _: None
) -> Iterator[Inputs]:
    """Inputs [B, S] of the first training samples: `prune.calibration_tokens` in whole sequences, at least one.

    Args:
        micro_batch_size: sequences per batch (B).
        advance: called with the tokens of each batch that has been used.
    """
    length = recipe.data.sequence_length
    mixture = initial_mixture(recipe, corpus=corpus)
    count = max(1, recipe.pruning.prune.calibration_tokens // length)
    device = resolve_device(recipe.training)
    for first in range(0, count, micro_batch_size):
        batch = mixture.batch(first_sample=first, num_sequences=min(micro_batch_size, count - first))
        tokens_BS = batch.tokens[:, :-1].to(device)
        yield Inputs(tokens_BS, mixture.documents.documents(batch.positions, device=device))
        advance(tokens_BS.numel())


def measure_heldout(
    recipe: Recipe,
    *,
    stage: TrainingStage,
    model: PreTrainedModel,
    corpus: Corpus,
    advance: Callable[[int], None],
    objective: Callable[[Tensor, Documents | None], Tensor] | None = None,
    processes: Processes | None = None,
) -> dict[str, float]:
    """Mean held-out loss of each domain, nats per token, on the subset that updates the mixture.

    Args:
        advance: called with the number of tokens just read.
        objective, processes: see `heldout_loss`.
    """
    losses = heldout_loss(
        model,
        corpus,
        tokens_per_domain=recipe.mixture.heldout_tokens,
        sequence_length=recipe.data.sequence_length,
        micro_batch_size=recipe.training_stages[stage].micro_batch_size,
        precision=resolve_precision(recipe.training, device=resolve_device(recipe.training)),
        progress=advance,
        chunk_tokens=recipe.training.loss_chunk_tokens,
        rules=document_rules(recipe),
        objective=objective,
        processes=processes,
    )
    return {domain: loss.loss for domain, loss in losses.items()}


def heldout_tokens(recipe: Recipe, *, corpus: Corpus) -> int:
    """Tokens that `measure_heldout` reads: whole rows, no more than each domain has."""
    length = recipe.data.sequence_length
    rows = (corpus.heldout_rows(domain, sequence_length=length) for domain in corpus.domains)
    return sum(max(1, min(count, recipe.mixture.heldout_tokens // length)) for count in rows) * length
