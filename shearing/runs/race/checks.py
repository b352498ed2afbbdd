"""What cannot be raced, found before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from shearing.errors import CombinedShearingError, ShearingError, nearest_name
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import SIZE_OF
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.registry import METRICS, complete_metrics, metric_of
from shearing.runs.race.flops import metrics_of
from shearing.runs.race.methods import METHODS, START, Contender, Ranking, Scratch, Stages, chooses_sublayers
from shearing.runs.race.rows import RaceSettings, Row, Steps
from shearing.runs.recipe import Recipe
from shearing.training.adapters.recipe import ADAPTERS


def collected(check: Callable[[], object]) -> list[ShearingError]:
    """What a check finds, one by one; empty if nothing."""
    try:
        check()
    except ShearingError as error:
        return list(error.errors) if isinstance(error, CombinedShearingError) else [error]
    return []


def refuse(errors: Sequence[ShearingError]) -> None:
    """Raise what was found, each once, if anything was.

    Raises:
        ShearingError: all of it, together.
    """
    found = list({str(error): error for error in errors}.values())
    if found:
        raise found[0] if len(found) == 1 else CombinedShearingError(found)


def mistakes(settings: RaceSettings) -> Iterator[ShearingError]:
    """What is wrong whatever the model is."""
    for name in settings.methods:
        if name not in METHODS:
            yield ShearingError(
                "--methods",
                value=name,
                allowed=", ".join(METHODS),
                mend=nearest_name(name, METHODS) or "choose among those",
            )
    complete = complete_metrics()
    if settings.rest_by not in complete:
        yield ShearingError(
            "--rest-by",
            value=settings.rest_by,
            allowed=f"a metric that scores everything: {', '.join(complete)}",
            mend=nearest_name(settings.rest_by, complete) or "choose among those",
        )
    for option, values in (
        ("--methods", settings.methods),
        ("--seeds", settings.seeds),
        ("--tokens", settings.tokens),
        ("--equal", settings.equal),
    ):
        if not values or len(set(values)) < len(values):
            yield ShearingError(
                option, value=",".join(map(str, values)), allowed="at least one, each once", mend="correct the list"
            )
    if settings.flops is not None and not 0 < settings.flops < math.inf:
        yield ShearingError(
            "--flops",
            value=settings.flops,
            allowed="a number of FLOPs, more than 0, as 1e15",
            mend="correct the value, or leave it out",
        )
    elif settings.flops is not None and (len(settings.tokens) > 1 or "flops" not in settings.equal):
        yield ShearingError(
            "--flops",
            value=settings.flops,
            allowed="with one number of --tokens, and --equal flops among the tables",
            mend="leave it out: every budget then has the FLOPs that start takes at it",
        )
    yield from _recipe_mistakes(settings.recipe)


def _recipe_mistakes(recipe: Recipe) -> Iterator[ShearingError]:
    try:
        target = recipe.pruning.target
    except ShearingError as error:
        yield error
        return
    if target.parameters is not None:
        yield ShearingError(
            "target.parameters",
            value=target.parameters,
            allowed="for a race, sizes by name: all rows have one shape",
            mend="set target.parameters=null and the sizes",
        )
    if recipe.prune is not None and recipe.prune.rotate != "none":
        yield ShearingError(
            "prune.rotate",
            value=recipe.prune.rotate,
            allowed="none in a race: rows are cut from the source as it is",
            mend="set prune.rotate=none",
        )
    if recipe.cascade is not None:
        yield ShearingError(
            "cascade", value="a section", allowed="none in a race: all rows have one shape", mend="set cascade=null"
        )
    if recipe.family is not None:
        yield ShearingError(
            "family", value="a section", allowed="none in a race: all rows have one shape", mend="set family=null"
        )
    if recipe.sparsify is not None:
        yield ShearingError(
            "sparsify", value="a section", allowed="none in a race of what is cut", mend="set sparsify=null"
        )
    for name in (*ADAPTERS, "ast"):
        if getattr(recipe.pretrain, name) is not None:
            yield ShearingError(
                f"pretrain.{name}",
                value="a section",
                allowed="none in a race: all weights train",
                mend=f"set pretrain.{name}=null",
            )


def short_budgets(budgets: Mapping[int, int], *, steps: Steps) -> Iterator[ShearingError]:
    for tokens, count in budgets.items():
        if count < 2:
            yield ShearingError(
                "--tokens",
                value=tokens,
                allowed=f"at least two steps: {2 * steps.tokens_per_step} tokens",
                mend="give a larger budget, or set a smaller pretrain.batch_size",
            )


def require_masks_that_move(row: Row, *, recipe: Recipe) -> None:
    """What a method's schedule has is there after rounding to steps: a ramp, and steps in which masks move."""
    how, prune, length = row.contender.facts.how, recipe.pruning.prune, recipe.data.sequence_length
    if not isinstance(how, Stages) or prune.masks != "learned":
        return
    before = prune.total_steps(sequence_length=length)
    ramp = prune.in_steps(prune.sparsity_warmup, sequence_length=length)
    frozen = prune.in_steps(prune.freeze, sequence_length=length)
    lost = (prune.sparsity_warmup.fraction or 0) > 0 and ramp == 0
    if lost or (frozen == before and prune.freeze.fraction != 1.0):
        raise ShearingError(
            "--tokens",
            value=f"{row.steps} steps, {before} of them before the cut",
            allowed=f"enough steps for the schedule of {row.contender.method}: "
            f"sparsity_warmup {prune.sparsity_warmup}, freeze {prune.freeze}",
            mend=f"give a larger budget, or leave {row.contender.method} out of --methods",
        )


def unfit(contender: Contender, *, recipe: Recipe, source: Shape, target: Shape) -> Iterator[ShearingError]:
    """What a method cannot do for this model and this target."""
    shrinks = {name for name, size in SIZE_OF.items() if getattr(target, size) < getattr(source, size)}
    how = contender.facts.how
    if isinstance(how, Ranking) and not METRICS[how.metric].gives & shrinks:
        yield ShearingError(
            "--methods",
            value=contender.method,
            allowed="a method that chooses something that this target cuts: it scores "
            f"{', '.join(sorted(METRICS[how.metric].gives))}, and the target cuts {', '.join(sorted(shrinks))}",
            mend=f"leave {contender.method} out, or set a target that cuts what it scores",
        )
    elif isinstance(how, Ranking) and chooses_sublayers(how) and source.family.parallel:
        yield ShearingError(
            "--methods",
            value=contender.method,
            allowed=f"a method that scores whole layers: attention and MLP of a layer of this "
            f"{source.family.model_type!r} read the same residual stream and go together",
            mend=f"leave {contender.method} out",
        )
    distill = recipe.distill
    if isinstance(how, Scratch) and distill is not None and distill.hidden is not None:
        yield ShearingError(
            "--methods",
            value=contender.method,
            allowed="with distill.hidden, a method that keeps units of the source: streams are compared dimension by "
            "dimension, and a model from scratch has none of the teacher's",
            mend=f"leave {contender.method} out, or set distill.hidden=null",
        )
    for metric in metrics_of(contender, recipe=recipe):
        evidence = Evidence(target=target, seed=recipe.seed)
        yield from collected(partial(metric_of(metric).units_of_work, source, evidence=evidence))
    prune, length = recipe.pruning.prune, recipe.data.sequence_length
    if contender.method == START and prune.graded_by is None:
        yield ShearingError(
            "prune.initial_masks",
            value=prune.initial_masks,
            allowed="a metric, where masks are to be frozen as they start: open ones choose nothing",
            mend=f"leave {START} out of --methods, or set prune.initial_masks=reconstruction",
        )
    elif contender.refitted and isinstance(how, Stages) and not prune.refits(sequence_length=length):
        yield ShearingError(
            "--refit",
            value=f"{contender.method}, refitted",
            allowed="a refit of masks that start at the target: prune.initial_masks that is not open, "
            "prune.sparsity_warmup of 0",
            mend=f"set those, give --refit without, or leave {contender.method} out of --methods",
        )
