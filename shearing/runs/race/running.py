"""One row of a race, from where it was interrupted to its end."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from shearing.files.durable import read_json, write_json
from shearing.models.cutting import Selection
from shearing.models.masked import Masks
from shearing.models.shape import Shape
from shearing.runs.context import RunContext
from shearing.runs.race.choosing import (
    NotFiniteError,
    cut_of,
    evaluate_own_form,
    facts_of,
    keep_masks,
    scores_of,
    seconds_beside,
    target_of,
)
from shearing.runs.race.flops import Flops
from shearing.runs.race.judging import load_model, losses_of
from shearing.runs.race.methods import Ranking, Stages
from shearing.runs.race.records import RaceFolder, Record
from shearing.runs.race.rows import Row
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.choices import keep_scores, kept_scores
from shearing.runs.stages.compact import compact
from shearing.runs.stages.pretrain import pretrain
from shearing.runs.stages.prune import prune

AFTER_CUTTING = "after-cutting.json"
"""In the folder of a row's run: what its model was worth right after the cut."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a row is when it has been cut.

    Attributes:
        units: hash of the unit set; None where no unit of the source is left.
        changed: units by granularity that are not those of the start; None where there are no masks.
        losses: right after the cut.
        seconds: choosing and refit, where they are known apart from training.
    """

    units: str | None
    changed: dict[str, Any] | None
    losses: dict[str, Any]
    seconds: dict[str, float]


def run_row(row: Row, *, context: RunContext, folder: RaceFolder, flops: Flops) -> Record:
    """The figures of a row, without its fingerprint.

    Args:
        row: which one.
        context: of its own recipe.
        folder: of the race.
        flops: what it takes.

    Raises:
        NotFiniteError: scores or the loss in the end are no numbers.
        ShearingError: training had to stop.
        Interrupted: a signal asked to stop.
    """
    if row.contender.own_sizes:
        own = evaluate_own_form(row, context=context, folder=folder)
        return {**_head(row), **own, "flops": {**asdict(flops), "total": flops.total}}
    run = context.directory
    by_stages = isinstance(row.contender.facts.how, Stages)
    chosen = _learn(context, folder=folder) if by_stages else _cut_at_once(row, context=context, folder=folder)
    if not run.is_complete("pretrain"):
        pretrain(context)
    # Killed between moving the model that is kept and writing the row, it is there already.
    model = run.model if run.model.is_dir() else folder.model(row)
    trained = load_model(model, context=context)
    final = losses_of(trained, context=context)
    if final["mean"] is None:
        raise NotFiniteError("the loss after training is no number")
    validation = losses_of(trained, context=context, split="validation")
    shape, recipe = target_of(context), context.recipe
    return {
        **_head(row),
        "steps": row.steps,
        "tokens": row.steps * recipe.pretrain.tokens_per_step(sequence_length=recipe.data.sequence_length),
        "shape": shape.sizes(),
        "parameters": shape.num_parameters(),
        "units": chosen.units,
        "changed_from_start": chosen.changed,
        "flops": {**asdict(flops), "total": flops.total},
        "losses": {"after_cutting": chosen.losses, "final": final, "validation": validation},
        "seconds": {**chosen.seconds, "training": round(_seconds_of_steps(run), 3)},
    }


def _head(row: Row) -> Record:
    facts = row.contender.facts
    return {
        "refitted": row.contender.refitted,
        "rest_by": row.contender.rest_by,
        "source": facts.source,
        "reconstructed": facts.reconstructed,
        "seed": row.seed,
    }


def keep_model(context: RunContext, *, place: Path) -> None:
    """Move the final model of a row out of its run's folder, unless that was done."""
    if not context.directory.model.is_dir():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    context.directory.model.rename(place)


def _cut_at_once(row: Row, *, context: RunContext, folder: RaceFolder) -> Chosen:
    """The run as if mask learning had taken no step: the model that other rows share is what it goes on from."""
    run, cut = context.directory, cut_of(row, context=context, folder=folder)
    facts = facts_of(cut)
    if not run.is_complete("prune"):
        run.path.mkdir(parents=True, exist_ok=True)
        run.compact.unlink(missing_ok=True)
        run.compact.symlink_to(cut.resolve(), target_is_directory=True)
        if isinstance(row.contender.facts.how, Ranking):
            keep_masks(row, context=context, folder=folder)
        mixture = context.initial_mixture()
        run.mark_complete("compact", {"parameters": target_of(context).num_parameters()})
        state = {"weights": mixture.weights, "mixture_state": mixture.state_dict(), "reference": {}}
        run.mark_complete("prune", state)
    return Chosen(units=facts["units"], changed=None, losses=facts["losses"], seconds=facts["seconds"])


def _learn(context: RunContext, *, folder: RaceFolder) -> Chosen:
    """The stages of a run up to the cut; its start is graded by scores that other rows may have measured."""
    run, start, seconds = context.directory, context.recipe.pruning.prune.graded_by, {"choosing": 0.0}
    if start is not None:
        scores = scores_of(start, context=context, folder=folder)
        seconds["choosing"] = read_json(seconds_beside(scores))["seconds"]
        if kept_scores(context, metric=start, target=target_of(context)) is None:
            run.prune.mkdir(parents=True, exist_ok=True)
            keep_scores(context, load_file(scores), metric=start, target=target_of(context))
    if not run.is_complete("prune"):
        prune(context)
    if not run.is_complete("compact"):
        compact(context)
    after_cutting = run.path / AFTER_CUTTING
    if not after_cutting.is_file():
        write_json(after_cutting, losses_of(load_model(run.compact, context=context), context=context))
    masks = {name: mask for name, mask in load_file(run.prune / "masks.safetensors").items() if "/" not in name}
    selection = Selection.of(Masks(**masks), source=Shape.of(context.config), target=target_of(context))
    return Chosen(
        units=selection.digest,
        changed=read_json(run.prune / "summary.json").get("changed_from_start"),
        losses=read_json(after_cutting),
        seconds=seconds,
    )


def _seconds_of_steps(run: RunDirectory) -> float:
    """Of all steps, those of processes that were killed included."""
    total = 0.0
    for path in (run.metrics("prune"), run.metrics("pretrain")):
        if path.is_file():
            lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            total += sum(line["seconds"] for line in lines if "event" not in line)
    return total
