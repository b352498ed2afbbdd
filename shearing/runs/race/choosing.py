"""What rows of a race share: the scores of a metric on a seed's text, and the model that is cut by them."""

from __future__ import annotations

import copy
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from shearing.files.durable import flush_tree, read_json, write_json
from shearing.files.tensors import write_tensors
from shearing.models.attention import attention_within_documents
from shearing.models.cutting import Selection, compact
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape, config_for, resolve_target
from shearing.models.stored.saving import write_model
from shearing.progress import activity
from shearing.pruning.structured.granularities import as_masks, granularities_of
from shearing.pruning.structured.importance.inputs.mean_bias import fold_means, with_biases
from shearing.pruning.structured.importance.metric import Evidence, Scores
from shearing.pruning.structured.importance.registry import METRICS, metric_of
from shearing.pruning.structured.parameter_budget import count_parameters
from shearing.pruning.structured.refitting.linear import refit
from shearing.pruning.structured.rounding import every_granularity, round_to_target, select_across_layers
from shearing.runs.context import RunContext
from shearing.runs.race.judging import load_model, losses_of
from shearing.runs.race.methods import Contender, Ranking, chooses_sublayers
from shearing.runs.race.records import RaceFolder
from shearing.runs.race.rows import Row
from shearing.runs.stages.source_model import load_source_model
from shearing.training.checkpoints.state import seed_random

FACTS = "cut.json"
"""In the folder of a cut model, written last: what choosing it took and what it is worth before any training."""


class NotFiniteError(ArithmeticError):
    """A method came to scores or a loss that is no number."""


def target_of(context: RunContext) -> Shape:
    """The shape of all rows."""
    return resolve_target(context.recipe.pruning.target, source=context.config)


def evidence_of(context: RunContext, *, reads_text: bool = True) -> Evidence:
    """What metrics go by: the first text that training will see, the target and the seed."""
    text = context.calibration_batches() if reads_text else ()
    return Evidence(text=text, target=target_of(context), seed=context.recipe.seed)


def scores_of(metric: str, *, context: RunContext, folder: RaceFolder) -> Path:
    """File of a metric's scores on a seed's text, measured if it is not there; beside it the seconds that it took.

    Raises:
        NotFiniteError: a score is NaN.
    """
    path = folder.scores(metric, seed=context.recipe.seed)
    if path.is_file():
        return path
    started = time.perf_counter()
    model = load_source_model(context)
    evidence = evidence_of(context, reads_text=METRICS[metric].reads_text)
    chooser = metric_of(metric)
    work = chooser.units_of_work(Shape.of(model.config), evidence=evidence)
    with (
        attention_within_documents(model, on=context.document_rules.attention_within),
        activity(f"importance by {metric}", total=work, console=context.console) as advance,
    ):
        scores = chooser.scores(model, evidence=evidence, advance=advance)
    for name, values in scores.items():
        if bool(values.isnan().any()):
            raise NotFiniteError(f"scores of {name} by {metric} are NaN")
    write_json(seconds_beside(path), {"seconds": round(time.perf_counter() - started, 3)})
    write_tensors(path, {name: values.contiguous() for name, values in scores.items()})
    return path


def seconds_beside(path: Path) -> Path:
    """The file that says how long scores took."""
    return path.with_suffix(".json")


def choose(contender: Contender, *, scores: Scores, source: Shape, target: Shape) -> tuple[Masks, Selection]:
    """The units that a ranking keeps at the target shape.

    Args:
        contender: a ranking.
        scores: of everything that the target cuts.
        source, target: shapes.
    """
    how = contender.facts.how
    assert isinstance(how, Ranking)
    apart, every = chooses_sublayers(how), every_granularity(source)
    names = [name for name in every if not (apart and name == "layers")] + (["sublayers"] if apart else [])
    granularities = granularities_of(names, source=source, target=target)
    masks = as_masks(round_to_target(scores, granularities=granularities))
    return masks, Selection.of(masks, source=source, target=target)


def keep_masks(row: Row, *, context: RunContext, folder: RaceFolder) -> None:
    """Write what a ranking keeps of the source where mask learning would: what compares the two reads it there."""
    scores, _ = _scores(row.contender, context=context, folder=folder)
    masks, _ = choose(row.contender, scores=scores, source=Shape.of(context.config), target=target_of(context))
    context.directory.prune.mkdir(parents=True, exist_ok=True)
    kept = {name: mask.clone() for name, mask in masks.tensors().items()}
    write_tensors(context.directory.prune / "masks.safetensors", kept)


def evaluate_own_form(row: Row, *, context: RunContext, folder: RaceFolder) -> dict[str, Any]:
    """What a method's own sizes by layer are worth, of as many parameters as the target has, before any training.

    Without a refit, a method that folds means into biases has them (FLAP, arXiv 2312.11983), in a model that is given
    biases where it had none; they are not among the parameters.

    Returns:
        `parameters`, `losses` and `seconds`.
    """
    scores, seconds = _scores(row.contender, context=context, folder=folder)
    model = load_source_model(context)
    source, target = Shape.of(model.config), target_of(context)
    masks = select_across_layers(scores, source=source, target=target).to(context.device)
    started = time.perf_counter()
    if row.contender.refitted:
        masked = _refitted(model, masks=masks, context=context)
    elif row.contender.folds_means:
        masked = MaskedModel(with_biases(model))
        with attention_within_documents(masked.model, on=context.document_rules.attention_within):
            fold_means(masked, masks=masks, batches=context.calibration_batches())
    else:
        masked = MaskedModel(model)
    adapted = row.contender.refitted or row.contender.folds_means
    seconds["refit"] = round(time.perf_counter() - started, 3) if adapted else 0.0
    masked.set_masks(masks)
    return {
        "parameters": int(count_parameters({name: z.double() for name, z in masks.tensors().items()}, source=source)),
        "losses": {"after_cutting": losses_of(masked, context=context)},
        "seconds": seconds,
    }


def cut_of(row: Row, *, context: RunContext, folder: RaceFolder) -> Path:
    """Folder of the model that a ranking, or training from scratch, starts from; made if it is not there.

    Raises:
        NotFiniteError: a score is NaN.
    """
    place = folder.cut(row)
    if (place / FACTS).is_file():
        return place
    shutil.rmtree(place, ignore_errors=True)
    if isinstance(row.contender.facts.how, Ranking):
        model, facts = _cut_by_scores(row, context=context, folder=folder)
    else:
        model, facts = _from_chance(context), {"units": None, "seconds": {"choosing": 0.0, "refit": 0.0}}
    write_model(model, place)
    flush_tree(place)
    write_json(place / FACTS, {**facts, "losses": losses_of(load_model(place, context=context), context=context)})
    return place


def facts_of(cut: Path) -> dict[str, Any]:
    """Of a cut model: `units`, `seconds`, and `losses` before any training."""
    return read_json(cut / FACTS)


def _scores(contender: Contender, *, context: RunContext, folder: RaceFolder) -> tuple[Scores, dict[str, float]]:
    """All scores of a ranking, those of its own metric first, and the seconds that they took."""
    how = contender.facts.how
    assert isinstance(how, Ranking)
    scores: Scores = {}
    seconds = 0.0
    for metric in filter(None, (contender.rest_by, how.metric)):
        file = scores_of(metric, context=context, folder=folder)
        given = load_file(file)
        scores |= (
            given
            if metric == contender.rest_by
            else {name: given[name] for name in METRICS[metric].gives if name in given}
        )
        seconds += read_json(seconds_beside(file))["seconds"]
    return scores, {"choosing": seconds}


def _cut_by_scores(row: Row, *, context: RunContext, folder: RaceFolder) -> tuple[PreTrainedModel, dict[str, Any]]:
    scores, seconds = _scores(row.contender, context=context, folder=folder)
    model = load_source_model(context)
    masks, selection = choose(row.contender, scores=scores, source=Shape.of(model.config), target=target_of(context))
    started = time.perf_counter()
    if row.contender.refitted:
        _refitted(model, masks=masks.to(context.device), context=context).release()
    seconds["refit"] = round(time.perf_counter() - started, 3) if row.contender.refitted else 0.0
    small = compact(model, masks=masks, selection=selection)
    return small, {"units": selection.digest, "seconds": seconds}


def _refitted(model: PreTrainedModel, *, masks: Masks, context: RunContext) -> MaskedModel:
    masked, prune = MaskedModel(model), context.recipe.pruning.prune
    layers = model.config.num_hidden_layers
    with (
        attention_within_documents(model, on=context.document_rules.attention_within),
        activity("refit of the weights that stay", total=layers, console=context.console) as advance,
    ):
        refit(
            masked,
            masks=masks,
            batches=context.calibration_batches(),
            ridge=prune.refit_ridge,
            blocks=prune.block_refit,
            advance=advance,
        )
    return masked


def _from_chance(context: RunContext) -> PreTrainedModel:
    """A model of the target's config, its weights drawn as the family draws them."""
    target = target_of(context)
    config = config_for(copy.deepcopy(context.config), shape=target, attention_layers=range(target.num_hidden_layers))
    seed_random(context.recipe.seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model
