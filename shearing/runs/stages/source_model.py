"""The source model of a run: how it is loaded, and the losses that it sets as reference; and its teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shearing.data.mixture.reference import resolve_reference
from shearing.errors import named
from shearing.files.durable import read_json, write_json
from shearing.models.loading import load_paged, load_source
from shearing.models.recipe import ModelRecipe
from shearing.models.stored.paging.on_demand import on_demand
from shearing.models.stored.paging.shared_out import share_out_layers
from shearing.models.stored.stored_model import Source, open_source
from shearing.objectives.teacher import teacher_precision
from shearing.progress import activity
from shearing.runs.context import RunContext
from shearing.runs.names import TEACHER_NAMES
from shearing.runs.recipe import TrainingStage
from shearing.runs.stages.heldout import REFERENCE_TOKENS, measure_heldout, steering_tokens, tokens_of_all
from shearing.training.device import offload_layers

_CONVERTED = ".source"
"""Folder in the run's for a source whose files have other names of parameters than its own, see `open_source`."""


def load_to_train(
    context: RunContext, *, source: str, revision: str | None, changes: Path | None = None, whole: bool = False
) -> PreTrainedModel:
    """A model with fp32 weights that runs on every process, and that the engine then takes over.

    Whole where the engine holds all weights in fp32 on every process. Where it shares them out, or rounds what it holds
    whole, weights stay in their files until then; see `models.stored.paging.paged`.

    Args:
        context: says on which device and with which attention.
        source, revision: of the model.
        changes: folder of weights that replace some of these once the engine takes over; None: none do.
        whole: whether it is to be whole in any case.

    Raises:
        ShearingError: see `load_source`.
    """
    attention, device = context.recipe.model.attn_implementation, context.device
    if whole or holds_all_in_fp32(context):
        return load_source(source, revision=revision, attn_implementation=attention, device=device)
    return load_paged(
        source,
        revision=revision,
        attn_implementation=attention,
        device=device,
        changes=changes,
    )


def holds_all_in_fp32(context: RunContext) -> bool:
    """See `TrainingRecipe.holds_all_in_fp32`."""
    return context.recipe.training.holds_all_in_fp32(bf16=context.precision == torch.bfloat16)


def load_source_model(context: RunContext) -> PreTrainedModel:
    """The source model itself, whole and in fp32.

    Raises:
        ShearingError: see `load_source`.
    """
    source = context.recipe.model
    return load_source(
        source.source,
        revision=source.revision,
        attn_implementation=source.attn_implementation,
        device=context.device,
    )


def source_to_read(
    context: RunContext, *, whole: Callable[[], PreTrainedModel], model: ModelRecipe | None = None
) -> PreTrainedModel:
    """The source model for forward passes that all processes make together, each of its own text.

    Args:
        context: of the run; each of its processes calls this.
        whole: gives it in memory, which one process alone can as well have where its engine does. Otherwise it is read
            from its files layer by layer, and no process has all of it.
        model: what stands for the source from now on, as the source in another basis; None: itself.

    Raises:
        ShearingError: see `load_source`, `open_source`.
    """
    source = model or context.recipe.model
    if context.processes.size == 1 and holds_all_in_fp32(context):
        return whole()
    return model_to_read(context, source=source.source, revision=source.revision)


def model_to_read(
    context: RunContext, *, source: str, revision: str | None, instead: Path | None = None
) -> PreTrainedModel:
    """A model whose weights come on demand, on each of the processes; see `on_demand`.

    Args:
        context: of the run; each of its processes calls this.
        source, revision: of the model.
        instead: folder of tensors that replace some of its own.

    Raises:
        ShearingError: see `open_source`.
    """
    files = open_files(context, source=source, revision=revision)
    attention = context.recipe.model.attn_implementation
    return on_demand(files, device=context.device, attn_implementation=attention, instead=instead)


def open_files(context: RunContext, *, source: str, revision: str | None) -> Source:
    """The files of a model, on each of the processes.

    Args:
        context: of the run; each of its processes calls this.
        source, revision: of the model.

    Raises:
        ShearingError: see `open_source`.
    """

    def opened() -> Source:
        return open_source(source, revision=revision, converted=context.directory.path / _CONVERTED)

    context.processes.on_main(lambda: bool(opened()))  # who is first may have to fetch or to convert it
    return context.processes.each(opened)


@named(TEACHER_NAMES)
def load_teacher(context: RunContext) -> PreTrainedModel:
    """The model that is listened to, where and in which precision the recipe has it; all processes call this.

    Raises:
        ShearingError: see `load_source`.
    """
    recipe, teacher = context.recipe, context.recipe.teacher
    assert recipe.distill is not None
    assert teacher is not None
    # Rows that a cache lacks are asked for as the others were.
    cache = context.teacher_cache
    precision = recipe.distill.precision if cache is None else cache.conditions.precision
    dtype = teacher_precision(precision, products=context.precision)
    if recipe.distill.placement == "shard":
        return shared_model(context, source=teacher.source, revision=teacher.revision, dtype=dtype)
    offloaded = recipe.distill.placement == "offload"
    model = load_source(
        teacher.source,
        revision=teacher.revision,
        attn_implementation=teacher.attn_implementation,
        device="cpu" if offloaded else context.device,
        dtype=dtype,
    )
    if offloaded:
        offload_layers(model, device=context.device)
    return model


def shared_model(context: RunContext, *, source: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """A model that is run and not trained, whose layers all processes have together; see `share_out_layers`.

    No process has it whole, unless its files hold other tensors than its parameters.

    Args:
        context: of the run; each of its processes calls this.
        source, revision: of the model.
        dtype: of its weights.

    Raises:
        ShearingError: see `load_source`.
    """
    model = context.processes.each(
        lambda: load_paged(
            source,
            revision=revision,
            attn_implementation=context.recipe.model.attn_implementation,
            device=context.device,
        )
    )
    share_out_layers(model, device=context.device, dtype=dtype, processes=context.processes)
    return model


def reference_losses(
    context: RunContext, *, stage: TrainingStage, source: Callable[[], PreTrainedModel], path: Path
) -> dict[str, float]:
    """Reference loss of each domain, resolved once per run; none where domain weights are constant.

    Args:
        context: of the run; each of its processes calls this.
        stage: the first that trains.
        source: gives the source model; called if its own losses are the reference and have not been measured.
        path: file (JSON) that keeps them.
    """
    mixture, processes = context.recipe.mixture, context.processes
    if mixture.update == "constant":
        return {}
    if not processes.on_main(path.is_file):
        losses: dict[str, float] = {}
        if mixture.reference in ("source", "online"):
            model, tokens = source(), steering_tokens(context)
            total = tokens_of_all(context, tokens=tokens)
            with activity("held-out losses of the source", total=total, console=context.console) as advance:
                losses = measure_heldout(
                    context, stage=stage, model=model, tokens=tokens, advance=advance, processes=processes
                )
            beside = {"tokens_per_domain": tokens}
            processes.on_main(lambda: write_json(path.with_name(REFERENCE_TOKENS), beside))
        domains = context.corpus.domains
        processes.on_main(
            lambda: write_json(path, resolve_reference(mixture, domains=domains, measure_source=lambda: losses))
        )
    return processes.on_main(lambda: read_json(path))
