"""Continued pretraining of the cut or sparse model, or of the source itself; the zeros of a sparse model stay."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shearing.errors import ShearingError, named
from shearing.evaluation.environment import environment
from shearing.files.durable import flush_folder, flush_tree
from shearing.files.full_disk import full_disk_said
from shearing.models.correspondence import Correspondence
from shearing.models.shape import Shape
from shearing.models.stored.companions import copy_companions
from shearing.models.stored.paging.on_demand import on_demand
from shearing.models.stored.saving import write_model
from shearing.models.stored.stored_model import open_source
from shearing.objectives.objective import PARAMETER_PREFIX
from shearing.pruning.sparse.stored.trained import require_zeros, write_trained
from shearing.pruning.structured.masking.nested import NestedMasking
from shearing.runs.context import RunContext
from shearing.runs.export.vocabulary import CutVocabulary, cut_to_corpus
from shearing.runs.names import COMPONENT_NAMES
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.compact import kept_units
from shearing.runs.stages.heldout import REFERENCE
from shearing.runs.stages.pretraining.family import family_masking, write_family
from shearing.runs.stages.pretraining.start import (
    Start,
    choose_salient,
    dropped_weights,
    measure_input_norms,
    moved_masks,
    moving_masks,
    result_dtype,
    way_of,
)
from shearing.runs.stages.source_model import holds_all_in_fp32, load_to_train, reference_losses, source_to_read
from shearing.runs.stages.training_task import task_of
from shearing.training.adapters.recipe import SpeftRecipe
from shearing.training.checkpoints.checkpoints import no_space
from shearing.training.checkpoints.pieces import SavedMoments, ShardedState
from shearing.training.checkpoints.state import seed_random
from shearing.training.engines.moving_masks import MovingMasks
from shearing.training.loop import train
from shearing.training.metrics import print_summary
from shearing.training.stage import Trained


@named(COMPONENT_NAMES)
def pretrain(context: RunContext) -> dict[str, Any]:
    """Write run_dir/model, a plain Hugging Face model, and run_dir/pretrain with metrics and checkpoints.

    With the section `family` it trains several sizes in turns, and run_dir/family has the smaller ones.

    After mask learning, the stream of samples, the domain weights, the reference losses and, with
    `pretrain.optimizer: carried`, AdamW's moments go on where it ended. What the masks of a sparse model drop is 0
    after every step, and the result has those masks and a manifest that is true of it. Continues from the newest
    checkpoint.

    Args:
        context: of a run whose stages before this one are complete; each of its processes calls this.

    Returns:
        The content of pretrain/complete.json: `weights`, `mixture_state`, `samples` (sequences drawn from each domain
        by this stage), `steps` and `tokens`.

    Raises:
        ShearingError: a stage before is not complete, masks that are not the model's, the corpus cannot be used, or
            training had to stop.
        Interrupted: a signal asked to stop.
    """
    recipe, run, processes = context.recipe, context.directory, context.processes
    before = {stage: run.read_complete(stage) for stage in recipe.stages[: recipe.stages.index("pretrain")]}
    mixture = context.initial_mixture()
    start = processes.each(lambda: Start.of(context))
    model = processes.each(lambda: load_to_train(context, source=start.source, revision=start.revision))
    if start.masks is not None:
        processes.on_main(partial(require_zeros, start.masks, model=model))
    learned = before.get("prune")
    if learned is None:
        reference = reference_losses(
            context,
            stage="pretrain",
            source=lambda: source_to_read(context, whole=lambda: _source(context, start=start, model=model)),
            path=run.pretrain / REFERENCE,
        )
    else:
        mixture.load_state_dict(learned["mixture_state"])
        reference = learned["reference"]
    first, drawn_before = mixture.next_sample, mixture.samples_per_domain()
    moving = _moving(context, start=start, model=model)
    if (adapters := recipe.pretrain.adapters) is not None:
        if isinstance(adapters, SpeftRecipe):
            whole = partial(_whole, context, start=start, model=model)
            processes.on_main(partial(choose_salient, context, settings=adapters, start=start, whole=whole))
        processes.each(lambda: start.adapt(model, adapters=adapters, seed=recipe.seed))
    masking = family_masking(context, start=start, model=model)
    task = task_of(
        context,
        stage="pretrain",
        model=model,
        mixture=mixture,
        masking=masking,
        reference=reference,
        rule={name: {} if learned is None else learned.get(f"rule_{name}", {}) for name in ("memory", "excess")},
        moments=None if learned is None else processes.each(lambda: _moments(context)),
        # Adapters leave the weights as they are, and their own products are masked.
        kept=None
        if start.masks is None or adapters is not None or moving is not None
        else partial(start.kept, prefix=PARAMETER_PREFIX),
        moving=moving,
        correspondence=partial(_correspondence, context),
    )

    seed_random(recipe.seed + processes.rank)  # dropout is of each process's own rows
    trained = train(task, console=context.console)
    gc.collect()  # as after mask learning

    num_samples = task.schedule.total_steps * task.schedule.sequences_per_step
    end = first + num_samples
    drawn = mixture.samples_per_domain(next_sample=end)
    complete = {
        "weights": mixture.weights,
        "mixture_state": mixture.state_dict(next_sample=end),
        "samples": {domain: count - drawn_before[domain] for domain, count in drawn.items()},
        "steps": task.schedule.total_steps,
        "tokens": num_samples * mixture.sequence_length,
    }
    processes.on_main(lambda: _finish(context, start=start, complete=complete, trained=trained, masking=masking))
    return complete


def _moving(context: RunContext, *, start: Start, model: PreTrainedModel) -> MovingMasks | None:
    """Masks that are chosen anew while training goes on, and what they drop brought back; None: they stay."""
    settings, processes = context.recipe.pretrain.ast, context.processes
    if settings is None:
        return None
    if settings.scores == "wanda":
        processes.on_main(partial(measure_input_norms, context, settings=settings, start=start, model=model))
    dropped = dropped_weights(context, start=start)
    return processes.each(lambda: moving_masks(context, settings=settings, start=start, dropped=dropped))


def _whole(context: RunContext, *, start: Start, model: PreTrainedModel) -> PreTrainedModel:
    """The model to be trained with all its weights in memory, for gradients of them: itself, or one beside it."""
    if holds_all_in_fp32(context):
        return model
    return load_to_train(context, source=start.source, revision=start.revision, whole=True)


def _source(context: RunContext, *, start: Start, model: PreTrainedModel) -> PreTrainedModel:
    """The source model, whose own losses may be the reference: the one to be trained, or the dense one before it."""
    source = context.recipe.model
    if start.source == source.source:
        return model
    return load_to_train(context, source=source.source, revision=source.revision)


def _correspondence(context: RunContext) -> Correspondence:
    """Of what is trained, the cut model or the source itself, to the source."""
    if "compact" in context.recipe.stages:
        return Correspondence.of_cut(kept_units(context).selection)
    return Correspondence.of_source(num_layers=Shape.of(context.config).num_hidden_layers)


def _finish(
    context: RunContext,
    *,
    start: Start,
    complete: dict[str, Any],
    trained: Trained,
    masking: NestedMasking | None,
) -> None:
    run, settings, state = context.directory, context.recipe.pretrain, ShardedState(trained.checkpoint)
    record = {
        "steps": complete["steps"],
        "tokens": complete["tokens"],
        **way_of(settings),
        "versions": environment(context.device),
    }
    size = None if context.recipe.target is None else context.recipe.target.vocab_size
    adapters = settings.adapters
    weights = start.weights(state) if adapters is None else start.merged_weights(state, adapters=adapters)
    write = partial(write_trained, source=start.folder, record=record, moved=moved_masks(state))
    _save_model(weights, run=run, start=start, write_trained=write, dtype=result_dtype(context))
    if size is not None:
        cut = _save_with_kept_tokens(context, size=size, start=start, write_trained=write)
        context.console.print(str(cut), soft_wrap=True, highlight=False)
    if masking is not None:
        write_family(context, masking=masking, start=start, state=state, dtype=result_dtype(context))
    run.mark_complete("pretrain", complete)
    print_summary("pretrain", trained.totals, console=context.console, rows={"model": str(run.model)})


def _save_with_kept_tokens(
    context: RunContext,
    *,
    size: int | str,
    start: Start,
    write_trained: Callable[[Path], None],
) -> CutVocabulary:
    """Write run_dir/model-kept-tokens as a whole or not at all, from run_dir/model."""
    run = context.directory
    beside = run.path / ".model-kept-tokens.partial"
    for folder in (beside, run.kept_tokens):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with full_disk_said(lambda: no_space(run.path)):
            shutil.copytree(run.model, beside)
            files = open_source(str(run.model), revision=None, converted=run.path / ".model.converted")
            whole = on_demand(files, device=torch.device("cpu"))
            cut = cut_to_corpus(beside, corpus=context.corpus, size=size, whole=whole, masks=start.masks)
            if start.masks is not None:
                write_trained(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    flush_tree(beside)
    beside.rename(run.kept_tokens)
    flush_folder(run.path)
    return cut


def _moments(context: RunContext) -> SavedMoments | None:
    """AdamW state of mask learning for the parameters of the cut model; None to start from nothing, as adapters do."""
    run, settings = context.directory, context.recipe.pretrain
    if not settings.carries:
        return None
    if not run.moments.is_file():
        raise ShearingError(
            "pretrain.optimizer",
            value="carried",
            allowed=f"a run with {run.moments}, which mask learning writes when it ends, if the recipe says so then",
            mend="set pretrain.optimizer=fresh with a warm-up (pretrain.warmup=3%), or put the file back",
        )
    return SavedMoments(run.moments, prefix=PARAMETER_PREFIX)


def _save_model(
    weights: Iterable[tuple[str, Tensor]],
    *,
    run: RunDirectory,
    start: Start,
    write_trained: Callable[[Path], None],
    dtype: torch.dtype,
) -> None:
    """Write run_dir/model as a whole or not at all, with all that stood beside the model that was trained.

    Args:
        weights: of what was trained, one after the other.
        run: of this folder.
        start: what training began with.
        write_trained: writes what is to be said of a sparse model.
        dtype: of the weights in the files.
    """
    beside = run.path / ".model.partial"
    for folder in (beside, run.model):
        if folder.exists():
            shutil.rmtree(folder)
    try:
        with full_disk_said(lambda: no_space(run.path)):
            write_model(start.skeleton(), beside, weights=weights, dtype=dtype)
            copy_companions(start.folder, to=beside)
            if start.masks is not None:
                write_trained(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    flush_tree(beside)
    beside.rename(run.model)
    flush_folder(run.path)
