"""Mask learning: masks, multipliers and weights trained together, ending at exactly the target shape.

Of a stage without steps, the start is what stays: graded, refitted, and cut at once.
"""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from shearing.data.mixture.sampler import Mixture
from shearing.errors import named
from shearing.files.durable import finite_or_none, flush_folder, write_json
from shearing.files.full_disk import full_disk_said
from shearing.files.tensors import write_in_turn, write_tensors
from shearing.models.attention import attention_within_documents
from shearing.models.correspondence import Correspondence
from shearing.models.cutting import cut_config, moments_in_turn
from shearing.models.loading import skeleton
from shearing.models.masked import MaskedModel
from shearing.models.recipe import ModelRecipe
from shearing.models.shape import Shape, resolve_target
from shearing.objectives.objective import PARAMETER_PREFIX
from shearing.processes.stop import stopping_at_once
from shearing.progress import activity
from shearing.pruning.rotation.basis import Basis
from shearing.pruning.rotation.components import principal_basis
from shearing.pruning.rotation.written import write_rotated
from shearing.pruning.structured.importance.metric import Scores
from shearing.pruning.structured.importance.registry import metric_of
from shearing.pruning.structured.learner import OPEN, MaskLearner
from shearing.pruning.structured.masking import Masking
from shearing.pruning.structured.masking.facts import MASKINGS
from shearing.pruning.structured.masking.removal import Removal
from shearing.pruning.structured.parameter_budget import shape_or_budget
from shearing.pruning.structured.refitting.linear import Refitted, refit
from shearing.runs.context import RunContext
from shearing.runs.continuation.cascade import first_source
from shearing.runs.names import COMPONENT_NAMES
from shearing.runs.planning.checks.pruning import last_checkpoint, no_moments
from shearing.runs.stages.choices import START_SCORES, evidence_for, keep_scores, kept_scores, refit_from_files
from shearing.runs.stages.heldout import REFERENCE
from shearing.runs.stages.source_model import (
    holds_all_in_fp32,
    load_source_model,
    load_to_train,
    model_to_read,
    reference_losses,
    source_to_read,
)
from shearing.runs.stages.training_task import task_of
from shearing.training.checkpoints.checkpoints import damage_of, no_space
from shearing.training.checkpoints.pieces import WEIGHT, ShardedState, write_moments
from shearing.training.checkpoints.state import seed_random
from shearing.training.loop import train
from shearing.training.metrics import print_summary
from shearing.training.stage import Trained
from shearing.training.task import Callback, Run, Task

REFITTED = ".refitted"
"""In the folder of mask learning, until training begins: refitted layers of a model that no process holds whole."""

ROTATION = "rotation.safetensors"
"""In the folder of mask learning: the basis that the source was rotated into."""

ROTATED = ".rotated"
"""In the folder of mask learning, until that is complete: the source in another basis, a model folder."""

MISSED_TARGET = 0.02
"""Share of the parameters that rounding may take or give before it is said."""


@named(COMPONENT_NAMES)
def prune(context: RunContext) -> dict[str, Any]:
    """Write run_dir/prune: final masks, trained weights of the source's size, metrics, summary.

    Continues from the newest checkpoint.

    Args:
        context: of the run; each of its processes calls this.

    Returns:
        The content of summary.json: by granularity `units`, `expected`, `target` and `kept` size, largest violation,
        `changed_from_start` and `ever_in_doubt` (units, see `MaskLearner.summary`) and `rounding_gap` (units that
        rounding to the target flipped); `parameters`, `learned` and `kept` ones, see `MaskLearner.parameter_counts`;
        `heldout`: loss of each domain under the final masks, before cutting; `samples`: sequences drawn from each
        domain; `steps` and `tokens`.

    Raises:
        ShearingError: the source model, the target or the corpus cannot be used, or training had to stop.
        Interrupted: a signal asked to stop.
    """
    recipe, run, processes = context.recipe, context.directory, context.processes
    mixture = context.initial_mixture()
    refitted = run.prune / REFITTED
    processes.on_main(lambda: _make_folder(run.prune, without=refitted))
    moments = processes.each(lambda: _moments(context))
    said = full_disk_said(lambda: no_space(run.prune))
    source = recipe.model
    if recipe.pruning.prune.rotate != "none":
        source = source.model_copy(update={"source": _rotated(context), "revision": None})
    model = processes.each(
        lambda: load_to_train(context, source=source.source, revision=source.revision, changes=refitted)
    )
    reference = reference_losses(
        context,
        stage="prune",
        source=lambda: _aimed_at(context, whole=model, source=source),
        path=run.prune / REFERENCE,
    )
    path = _initial_scores(context, whole=model, source=source)
    masking, choice = _masking(context, model=model, scores=None if path is None else load_file(path))
    task = task_of(
        context,
        stage="prune",
        model=model,
        mixture=mixture,
        masking=masking,
        reference=reference,
        moments=moments,
        before_first_step=partial(_refit, context, whole=masking.model, choice=choice, source=source),
        correspondence=lambda: Correspondence.of_masked(masking.model),
    )
    task = replace(task, callbacks=(*task.callbacks, _Remove(refitted)))

    seed_random(recipe.seed + processes.rank)  # dropout is of each process's own rows
    trained = train(task, console=context.console, measure_end=True)
    gc.collect()  # an engine that refers to itself would be there until Python comes to it
    return processes.on_main(
        said(lambda: _finish(context, model=model, task=task, choice=choice, trained=trained, mixture=mixture))
    )


def _make_folder(folder: Path, *, without: Path) -> None:
    """The folder of the stage, without what a refit that was interrupted has left."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(without, ignore_errors=True)


def _aimed_at(context: RunContext, *, whole: PreTrainedModel, source: ModelRecipe) -> PreTrainedModel:
    """The model whose own losses may be the reference: the source, of a later run of a cascade the first one."""
    first = first_source(context.recipe)
    if first == context.recipe.model:
        return source_to_read(context, whole=lambda: whole, model=source)
    return model_to_read(context, source=first.source, revision=first.revision)


class _Remove(Callback):
    """Removes a folder once the engine has the weights that are in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, run: Run) -> None:
        """See `Callback`."""
        if run.task.processes.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)


def _finish(
    context: RunContext,
    *,
    model: PreTrainedModel,
    task: Task,
    choice: MaskLearner | Removal,
    trained: Trained,
    mixture: Mixture,
) -> dict[str, Any]:
    """Write the results of mask learning out of its last checkpoint."""
    run, state = context.directory, ShardedState(trained.checkpoint)
    masks = choice.final_masks()
    write_tensors(run.prune / "masks.safetensors", {name: mask.clone() for name, mask in masks.tensors().items()})
    if context.recipe.pretrain.carries and (isinstance(choice.target, Shape) or choice.target.uniform):
        selection = choice.selection()
        bones = skeleton(cut_config(model.config, selection=selection))
        write_moments(
            run.moments,
            moments_in_turn(model.config, state.moments(prefix=PARAMETER_PREFIX), selection=selection),
            shapes={name: tuple(parameter.shape) for name, parameter in bones.named_parameters()},
        )
    # A tied weight appears once among the named parameters, as safetensors wants it.
    like = {name.removeprefix(PARAMETER_PREFIX): torch.empty(of, device="meta") for name, of in state.shapes.items()}
    weights = ((name.removeprefix(PARAMETER_PREFIX), weight) for name, weight in state.whole(WEIGHT))
    write_in_turn(run.prune / "model.safetensors", like, tensors=weights, metadata={})
    end = task.schedule.total_steps * task.schedule.sequences_per_step
    summary: dict[str, Any] = {
        **_by_figure(choice.summary()),
        "parameters": choice.parameter_counts(),
        "heldout": {"before_cutting": {name: finite_or_none(loss) for name, loss in (trained.heldout or {}).items()}},
        "samples": mixture.samples_per_domain(next_sample=end),
        "steps": task.schedule.total_steps,
        "tokens": end * mixture.sequence_length,
    }
    write_json(run.prune / "summary.json", summary)
    run.mark_complete(
        "prune",
        {
            "weights": mixture.weights,
            "mixture_state": mixture.state_dict(next_sample=end),
            "reference": dict(task.dynamic.reference) if task.dynamic else {},
            "rule_memory": trained.mixture_rule.get("memory", {}),
            "rule_excess": trained.mixture_rule.get("excess", {}),
        },
    )
    shutil.rmtree(run.prune / ROTATED, ignore_errors=True)
    learned = {
        f"{name}, kept of {summary['units'][name]}": _learned(summary, name=name) for name in summary.get("kept", {})
    }
    counts = summary["parameters"]
    learned["parameters"] = f"{counts['kept']:,} ({counts['learned']:,} when masks stopped moving)"
    print_summary("prune", trained.totals, console=context.console, rows=learned)
    missed = counts["learned"] / counts["kept"] - 1
    if abs(missed) > MISSED_TARGET:
        context.console.print(
            f"doubtful: when the masks stopped moving they left {counts['learned']:,} parameters, "
            f"{100 * missed:+.0f} % beside the {counts['kept']:,} that are kept: what lies between was chosen by "
            "rounding, not learned. Give them more steps (prune.duration, prune.freeze), or a shorter "
            "prune.sparsity_warmup",
            style="yellow",
        )
    return summary


def _learned(summary: Mapping[str, Any], *, name: str) -> str:
    """What became of a granularity, in words."""
    changed = summary["changed_from_start"][name]
    return (
        f"{summary['kept'][name]:g} (expected {summary['expected'][name]:.2f}), "
        f"{'started open' if changed == OPEN else f'{changed:,} changed from the start'}, "
        f"{summary['ever_in_doubt'][name]:,} of {summary['total_units'][name]:,} ever in doubt, "
        f"{summary['rounding_gap'][name]:,} flipped in rounding"
    )


def _moments(context: RunContext) -> ShardedState | None:
    """The optimiser's state at the end of the run that has trained the source; None: it starts from nothing.

    Raises:
        ShearingError: that run has not ended, or its last checkpoint is damaged.
    """
    if (last := last_checkpoint(context.recipe)) is None:
        return None
    if (damage := damage_of(last)) is not None:
        raise no_moments(f"{last}, which is damaged: {damage}")
    return ShardedState(last)


def _rotated(context: RunContext) -> str:
    """Folder with the source rotated into its principal components; the same ones however often a run is interrupted.

    All processes find them, each from its share of the text; the main one writes the folder, a tensor at a time.
    """
    folder, processes = context.directory.prune / ROTATED, context.processes
    if processes.on_main(folder.is_dir):
        return str(folder)
    model = source_to_read(context, whole=lambda: load_source_model(context))
    batches = context.calibration_batches()
    with (
        attention_within_documents(model, on=context.document_rules.attention_within),
        activity("principal components", total=len(batches), console=context.console) as advance,
    ):
        basis = principal_basis(model, batches, advance=advance, processes=processes)
    said = full_disk_said(lambda: no_space(context.directory.prune))
    processes.on_main(said(lambda: _keep_rotated(context, model, basis, folder=folder)))
    return str(folder)


def _keep_rotated(context: RunContext, model: PreTrainedModel, basis: Basis, *, folder: Path) -> None:
    write_tensors(
        context.directory.prune / ROTATION,
        {"rotation": basis.rotation.contiguous(), "moment": basis.moment.contiguous()},
    )
    beside = folder.with_name(f"{ROTATED}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    lost = write_rotated(model, basis, beside, config=context.config_as_cut)
    if lost:
        context.console.print(
            f"rotated; the head is the embedding, and its fitted gain changes logits by {lost:.2%} (root mean square)"
        )
    flush_folder(beside)
    beside.rename(folder)
    flush_folder(folder.parent)


def _initial_scores(context: RunContext, *, whole: PreTrainedModel, source: ModelRecipe) -> Path | None:
    """File with what grades the initial masks, measured once per run by all processes; None where they start open."""
    name, wanted, processes = context.recipe.pruning.prune.graded_by, context.recipe.pruning.target, context.processes
    if name is None:
        return None
    target = None if wanted.parameters is not None else resolve_target(wanted, source=whole.config)
    if processes.on_main(lambda: kept_scores(context, metric=name, target=target) is not None):
        return context.directory.prune / START_SCORES
    evidence, metric = evidence_for(context, metric=name, target=target), metric_of(name)
    work = metric.units_of_work(Shape.of(whole.config), evidence=evidence)
    model = source_to_read(context, whole=lambda: whole, model=source)
    with (
        attention_within_documents(model, on=context.document_rules.attention_within),
        activity(f"importance by {name}", total=work, console=context.console) as advance,
    ):
        scores = metric.scores(model, evidence=evidence, advance=advance)
    said = full_disk_said(lambda: no_space(context.directory.prune))
    return processes.on_main(said(lambda: keep_scores(context, scores, metric=name, target=target)))


def _refit(context: RunContext, *, whole: MaskedModel, choice: MaskLearner | Removal, source: ModelRecipe) -> None:
    """Refits the weights that stay to make up for what the masks close from the start, if they close anything.

    Several processes, and one that has no whole model, refit what they read from the files. The engine then takes the
    result from there, or from the main process's model.
    """
    prune = context.recipe.pruning.prune
    if not prune.refits(sequence_length=context.recipe.data.sequence_length):
        return
    layers = whole.model.config.num_hidden_layers
    with (
        stopping_at_once(),  # which training, under way already, would put off to its first step's end
        activity("compensation for what the masks close", total=layers, console=context.console) as advance,
    ):
        if context.processes.size == 1 and holds_all_in_fp32(context):
            found = refit(
                whole,
                masks=choice.final_masks(),
                batches=context.calibration_batches(),
                ridge=prune.refit_ridge,
                blocks=prune.block_refit,
                advance=advance,
            )
        else:
            folder = context.directory.prune / REFITTED
            found = refit_from_files(context, masks=choice.final_masks(), folder=folder, advance=advance, model=source)
            if holds_all_in_fp32(context):
                context.processes.on_main(partial(_take, whole.model, folder))
    _say(found, context=context)


def _say(found: Refitted, *, context: RunContext) -> None:
    """Which ridges held-out rows chose, and what steps of single blocks brought."""
    if context.recipe.pruning.prune.refit_ridge == "auto":
        counts = Counter(found.ridges.values())
        said = ", ".join(f"{ridge:g} of {counts[ridge]}" for ridge in sorted(counts))
        context.console.print(f"ridges by held-out rows, of {counts.total()} fits: {said}")
    if blocks := found.blocks.values():
        before, after = (sum(each) / len(blocks) for each in ([b.before for b in blocks], [b.after for b in blocks]))
        context.console.print(f"what blocks' outputs lack of the source's: {before:.2%}, after their steps {after:.2%}")


def _take(model: PreTrainedModel, folder: Path) -> None:
    """Replace weights of a model by those in a folder, which is gone then."""
    with torch.no_grad():
        for path in sorted(folder.glob("*.safetensors")):
            for name, weight in load_file(path).items():
                model.get_parameter(name).copy_(weight)
    shutil.rmtree(folder)


def _masking(
    context: RunContext, *, model: PreTrainedModel, scores: Scores | None
) -> tuple[Masking | Removal, MaskLearner | Removal]:
    """How units go, as a step drives it, and what says in the end which ones stay."""
    recipe, settings = context.recipe, context.recipe.pruning.prune
    if settings.masks == "learned":
        masking = Masking.of(
            model,
            settings,
            target=shape_or_budget(recipe.pruning.target, source=model.config),
            tokens_per_step=settings.tokens_per_step(sequence_length=recipe.data.sequence_length),
            seed=recipe.seed,
            scores=scores,
            device=context.device,
        )
        return masking, masking.learner
    removal: Removal = resolve_name(MASKINGS[settings.masks].home)(
        MaskedModel(model),
        settings.granularities,
        target=resolve_target(recipe.pruning.target, source=model.config),
        settings=settings,
        tokens_per_step=settings.tokens_per_step(sequence_length=recipe.data.sequence_length),
        device=context.device,
    )
    return removal, removal


def _by_figure(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{granularity: {figure: value}} turned into {figure: {granularity: value}}."""
    figures = {figure for values in summary.values() for figure in values}
    return {
        figure: {name: values[figure] for name, values in summary.items() if figure in values}
        for figure in sorted(figures)
    }
