"""Everything that can be checked and foreseen before the first expensive step, without loading weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from rich.console import Console

from shearing.data.corpus.format import read_index
from shearing.data.mixture.rules.update import largest_weights, rule_of
from shearing.errors import CombinedShearingError, ShearingError, key, named
from shearing.files.durable import existing_folder
from shearing.models.loading import require_weights
from shearing.models.shape import Shape
from shearing.objectives.recipe import require_domains
from shearing.pruning.structured.refitting.blocks import require_dense
from shearing.runs.context import RunContext
from shearing.runs.continuation.cascade import cascade_of, runs_before
from shearing.runs.continuation.family import family_shapes
from shearing.runs.names import COMPONENT_NAMES, DISTILL_NAMES
from shearing.runs.planning.capacity import Capacity, Devices, capacity
from shearing.runs.planning.checks.pruning import (
    doubts_of,
    odd_sizes,
    require_baselines,
    require_metric,
    require_moments,
    require_reference,
    require_rotation,
    require_vocabulary,
    said_of_architecture,
    targets_of,
)
from shearing.runs.planning.checks.settings import (
    require_context,
    require_engine,
    require_exportable,
    require_tasks,
    require_uncompiled,
)
from shearing.runs.planning.checks.sparsity import (
    require_adapters,
    require_calibration_text,
    require_moving,
    zeros_lost,
    zeros_of,
)
from shearing.runs.planning.checks.teacher import require_cached, require_teacher, teacher_in_words
from shearing.runs.planning.disk import bytes_free, bytes_in, cascade_bytes, run_bytes
from shearing.runs.planning.plan import reads_reference
from shearing.runs.planning.summary import Plan, gigabytes, training_plans
from shearing.runs.recipe import Recipe, split_batch
from shearing.runs.run_directory import RunDirectory, Stage
from shearing.training.trackers import require_trackers

_Checked = TypeVar("_Checked")


class _Findings:
    """What checks have refused, each thing once."""

    def __init__(self) -> None:
        self.errors: list[ShearingError] = []

    def attempt(self, check: Callable[[], _Checked]) -> _Checked | None:
        """What a check gives, or None where it refuses."""
        try:
            with named(COMPONENT_NAMES):
                return check()
        except ShearingError as error:
            said = {str(each) for each in self.errors}
            found = error.errors if isinstance(error, CombinedShearingError) else [error]
            self.errors += [each for each in found if str(each) not in said]
            return None


def preflight(
    context: RunContext,
    *,
    stages: Sequence[Stage] | None = None,
    devices: Devices | None = None,
    starts: bool = True,
) -> Plan:
    """Check that `stages` can run: model, target, corpus, tokenizer, hardware, disk, permission.

    Args:
        context: of the run; what is opened for a check is there for the stages.
        stages: the stages that are about to run; all of the recipe's if None.
        devices: the GPUs that processes run on, one each; those of this machine if None.
        starts: whether they run now, on the context's processes. Otherwise all GPUs are taken to be used, and what they
            cannot hold is said, not refused, as is a budget for mask learning alone; the text of tasks is not fetched.

    Raises:
        ShearingError: all that was found, together.
    """
    plan, errors = survey(context, stages=stages, devices=devices, starts=starts)
    if errors or plan is None:
        raise _together(errors)
    return plan


@named(COMPONENT_NAMES)
def survey(
    context: RunContext,
    *,
    stages: Sequence[Stage] | None = None,
    devices: Devices | None = None,
    starts: bool = True,
) -> tuple[Plan | None, list[ShearingError]]:
    """As `preflight`, but what stands in the way is beside the plan, not instead of it.

    Where no more is missing than the corpus, or the source's weights and tokenizer, there is a plan all the same: what
    the recipe and the source's config say by themselves, without domains. Where anything else is wrong there is none.
    """
    recipe = context.recipe
    stages = recipe.stages if stages is None else stages
    wrong, missing = _Findings(), _Findings()
    attempt = wrong.attempt
    _attempt_settings(context, stages=stages, starts=starts, attempt=attempt)
    stored = attempt(lambda: Shape.of(context.config))
    if stored is None:
        return None, wrong.errors
    config = context.config_as_cut
    missing.attempt(lambda: require_weights(recipe.model.source, revision=recipe.model.revision))
    if "prune" in stages:
        missing.attempt(lambda: require_moments(recipe, config=config))
    if _reads_first(recipe, stages=stages) and (before := attempt(lambda: runs_before(recipe))):
        missing.attempt(lambda: _require_first(before[0]))
    attempt(lambda: require_teacher(context))
    attempt(lambda: require_context(recipe, config=config))
    source = Shape.of(config)
    targets = attempt(lambda: targets_of(recipe, config=config)) or [None]
    target = targets[-1]
    family = attempt(lambda: family_shapes(recipe, source=config)) if target is not None or not recipe.prune else None
    attempt(lambda: require_metric(recipe, source=source))
    attempt(lambda: require_rotation(recipe, source=stored, target=targets[0]))
    attempt(lambda: require_uncompiled(recipe, source=source))
    attempt(lambda: require_dense(source, blocks=None if recipe.prune is None else recipe.prune.block_refit))
    attempt(lambda: require_vocabulary(recipe))
    attempt(lambda: require_baselines(recipe, source=source))
    zeros = attempt(lambda: zeros_of(recipe, config=config, target=target))
    lost = (attempt(lambda: list(zeros_lost(recipe))) if "prune" in stages else None) or []
    attempt(lambda: require_adapters(recipe, config=config, target=target))
    attempt(lambda: require_moving(recipe, source=source))
    corpus = missing.attempt(lambda: context.corpus)
    attempt(lambda: require_calibration_text(recipe, config=config, corpus=corpus))
    weights: dict[str, float] = {}
    doubts: list[str] = []
    if corpus is None:
        # That it is not there may stand behind a tokenizer that is not.
        missing.attempt(lambda: read_index(recipe.data.corpus))
    else:
        attempt(lambda: context.outside)
        weights = attempt(lambda: context.initial_weights) or {}
        if recipe.distill is not None:
            attempt(named(DISTILL_NAMES)(partial(require_domains, recipe.distill, domains=list(corpus.domains))))
            if set(recipe.training_stages) & set(stages):
                attempt(lambda: _require_cached(context))
        doubts = attempt(lambda: require_reference(recipe, corpus=corpus)) or []
    if wrong.errors:
        return None, [*wrong.errors, *missing.errors]
    gpus = _capacity(context, stages=stages, devices=devices or Devices.here(context.device), starts=starts)
    sizes = family or {}
    if recipe.cascade is not None:
        disk = cascade_bytes(recipe, source=config, processes=context.processes.size)
    else:
        disk = run_bytes(
            recipe,
            source=source,
            target=target,
            family=sizes.values(),
            processes=context.processes.size,
            complete=[stage for stage in recipe.stages if context.directory.is_complete(stage)],
        )
        disk = max(0, disk - bytes_in(recipe.run_dir))
    largest = largest_weights(rule_of(recipe.mixture, prior=weights), prior=weights) if weights else {}
    plan = Plan(
        source=source,
        target=target,
        budget=None if recipe.target is None else recipe.target.parameters,
        family=sizes,
        zeros=zeros,
        teacher=None if recipe.distill is None else teacher_in_words(context),
        uniform=recipe.target is None or target is not None or recipe.target.uniform,
        tokens={} if corpus is None else {name: each.train.tokens for name, each in corpus.manifests.items()},
        no_text=not recipe.data.corpus.is_dir(),
        weights=weights,
        largest=largest,
        training=list(training_plans(recipe, corpus=corpus, weights=weights, largest=largest)),
        doubts=[*doubts, *doubts_of(recipe, source=stored, target=target), *odd_sizes(recipe, source=source)],
        notes=[*gpus.notes, *said_of_architecture(target, config=config), *lost],
        disk=disk,
        free=bytes_free(recipe.run_dir),
    )
    missing.attempt(lambda: _require_free(recipe, needed=plan.disk, free=plan.free))
    return plan, missing.errors


def require_settings(context: RunContext, *, stages: Sequence[Stage]) -> None:
    """Check what can be before the source is there, as that of a cascade's last run: folder, device, engine, tasks.

    Args:
        context: of the run.
        stages: the stages that will run.

    Raises:
        ShearingError: all that was found, together.
    """
    wrong = _Findings()
    _attempt_settings(context, stages=stages, starts=True, attempt=wrong.attempt)
    if wrong.errors:
        raise _together(wrong.errors)


def _attempt_settings(
    context: RunContext, *, stages: Sequence[Stage], starts: bool, attempt: Callable[[Callable[[], object]], object]
) -> None:
    recipe = context.recipe
    attempt(context.directory.require_writable)
    attempt(lambda: context.device)
    attempt(lambda: require_engine(recipe))
    attempt(lambda: require_trackers(recipe.training))
    for stage in recipe.training_stages:
        if stage in stages:
            attempt(partial(split_batch, recipe, stage=stage, num_processes=context.processes.size))
    # The masks of a cascade's last run alone would be of a model that is not there.
    if starts or recipe.cascade is not None:
        attempt(lambda: require_exportable(recipe, stages=stages))
    if "evaluate" in stages:
        attempt(lambda: require_tasks(recipe, last=starts and len(stages) > 1))


def _reads_first(recipe: Recipe, *, stages: Sequence[Stage]) -> bool:
    """Whether stages of a cascade's run read the model that it began with, whatever they listen to."""
    return (
        "evaluate" in stages
        or ("prune" in stages and reads_reference(recipe, stage="prune"))
        or ("pretrain" in stages and recipe.model.save_dtype == "source")
    )


def _require_first(first: Recipe) -> None:
    """Check that the source of a cascade's first run is there, with which its last is compared.

    Raises:
        ShearingError: it is not.
    """
    try:
        require_weights(first.model.source, revision=first.model.revision)
    except ShearingError as error:
        raise ShearingError(
            f"{RunDirectory(first.run_dir).recipe} ({key('model.source')})",
            value=error.value,
            allowed="the model that this cascade began with, for its evaluation, its reference losses and the dtype of "
            f"its result: {error.allowed}",
            mend=f"put it there again, or say in that file where it is now ({error.mend})",
        ) from None


def require_cascade(context: RunContext) -> None:
    """Check of the runs of a cascade what is known before their sources are there: targets, vocabulary, cache, disk.

    Args:
        context: of the cascade.

    Raises:
        ShearingError: all that was found, together.
    """
    recipe, config, wrong = context.recipe, context.config_as_cut, _Findings()
    targets = wrong.attempt(lambda: targets_of(recipe, config=config))
    wrong.attempt(lambda: require_vocabulary(recipe))
    wrong.attempt(lambda: _require_cached(context))
    if targets is not None:
        needed = cascade_bytes(recipe, source=config, processes=context.processes.size)
        wrong.attempt(lambda: _require_free(recipe, needed=needed, free=bytes_free(recipe.run_dir)))
    if wrong.errors:
        raise _together(wrong.errors)


def _require_cached(context: RunContext) -> None:
    """As `require_cached`; of all runs of a cascade, which read text as the first source does.

    Raises:
        ShearingError: rows are missing.
    """
    recipe = context.recipe
    if recipe.cascade is None:
        require_cached(context)
        return
    for each in cascade_of(recipe):
        here = each.model_copy(update={"model": recipe.model})
        require_cached(replace(context, recipe=here, console=Console(quiet=True)))


def _require_free(recipe: Recipe, *, needed: int, free: int) -> None:
    if needed > free:
        if not shutil.disk_usage(there := existing_folder(recipe.run_dir)).total:
            raise ShearingError(
                "run_dir",
                value=str(recipe.run_dir),
                allowed="a folder on a disk",
                mend=f"no files can be made in {there}, which is on none: choose another {key('run_dir')}",
            )
        raise ShearingError(
            "run_dir",
            value=str(recipe.run_dir),
            allowed=f"{gigabytes(needed)} of free disk; there are {gigabytes(free)}",
            mend=f"choose a folder on another disk ({key('run_dir')}), or lower prune.keep_last and pretrain.keep_last",
        )


def _capacity(context: RunContext, *, stages: Sequence[Stage], devices: Devices | None, starts: bool) -> Capacity:
    """What GPUs cannot hold, refused where it is certain and the recipe does not want to try.

    Raises:
        ShearingError: they cannot.
    """
    if devices is None:
        return Capacity(unfit=None, notes=[])
    recipe = context.recipe
    processes = context.processes.size if starts else max(context.processes.size, devices.count)
    try:
        chosen = stages if starts else recipe.stages
        found = capacity(recipe, stages=chosen, processes=processes, devices=devices)
    except ShearingError:
        if starts:
            raise
        return Capacity(unfit=None, notes=[])  # processes that cannot share a batch: nobody has asked for so many
    if found.unfit is None:
        return found
    if starts and recipe.training.memory_check == "refuse":
        raise found.unfit
    return Capacity(unfit=found.unfit, notes=[f"too large: {found.unfit.allowed}; {found.unfit.mend}", *found.notes])


def _together(errors: Sequence[ShearingError]) -> ShearingError:
    return errors[0] if len(errors) == 1 else CombinedShearingError(errors)
