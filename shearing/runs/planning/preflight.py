"""Everything that can be checked and foreseen before the first expensive step, without loading weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from shearing.data.corpus.corpus import Corpus
from shearing.data.mixture.rules.update import largest_weights, rule_of
from shearing.errors import CombinedShearingError, ShearingError, named
from shearing.models.loading import require_weights
from shearing.models.shape import Shape
from shearing.objectives.recipe import require_domains
from shearing.runs.context import RunContext
from shearing.runs.continuation.cascade import require_shrinking
from shearing.runs.names import COMPONENT_NAMES, DISTILL_NAMES
from shearing.runs.planning.capacity import Capacity, Devices, capacity
from shearing.runs.planning.checks.pruning import (
    doubts_of,
    odd_sizes,
    require_baselines,
    require_metric,
    require_reference,
    require_rotation,
    require_vocabulary,
    said_of_architecture,
    target_of,
)
from shearing.runs.planning.checks.settings import (
    require_context,
    require_engine,
    require_exportable,
    require_tasks,
    require_uncompiled,
)
from shearing.runs.planning.checks.sparsity import require_adapters, require_moving, zeros_of
from shearing.runs.planning.checks.teacher import require_cached, require_teacher, teacher_in_words
from shearing.runs.planning.disk import bytes_free, bytes_in, run_bytes
from shearing.runs.planning.plan import heldout_shares
from shearing.runs.planning.summary import Plan, TrainingPlan, gigabytes
from shearing.runs.recipe import Recipe, split_batch
from shearing.runs.run_directory import Stage
from shearing.training.trackers import require_trackers

_Checked = TypeVar("_Checked")


@named(COMPONENT_NAMES)
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
            cannot hold is said, not refused.

    Raises:
        ShearingError: all that was found, together.
    """
    recipe = context.recipe
    stages = recipe.stages if stages is None else stages
    found: list[ShearingError] = []

    def attempt(check: Callable[[], _Checked]) -> _Checked | None:
        try:
            return check()
        except ShearingError as error:
            found.extend(error.errors if isinstance(error, CombinedShearingError) else [error])
            return None

    attempt(context.directory.require_writable)
    attempt(lambda: context.device)
    attempt(lambda: require_engine(recipe))
    attempt(lambda: require_trackers(recipe.training))
    for stage in recipe.training_stages:
        if stage in stages:
            attempt(partial(split_batch, recipe, stage=stage, num_processes=context.processes.size))
    attempt(lambda: require_exportable(recipe, stages=stages))
    if "evaluate" in stages:
        attempt(lambda: require_tasks(recipe, last=len(stages) > 1))
    config = attempt(lambda: context.config)
    if config is None:
        raise _together(found)
    attempt(lambda: require_weights(recipe.model.source, revision=recipe.model.revision))
    attempt(lambda: require_teacher(context))
    attempt(lambda: require_context(recipe, config=config))
    source = Shape.of(config)
    target = None if recipe.prune is None else attempt(lambda: target_of(recipe.pruning, config=config))
    attempt(lambda: require_shrinking(recipe, source=config))
    attempt(lambda: require_metric(recipe, source=source))
    attempt(lambda: require_rotation(recipe, source=source))
    attempt(lambda: require_uncompiled(recipe, source=source))
    attempt(lambda: require_vocabulary(recipe))
    attempt(lambda: require_baselines(recipe, source=source))
    zeros = attempt(lambda: zeros_of(recipe, config=config, target=target))
    attempt(lambda: require_adapters(recipe, config=config))
    attempt(lambda: require_moving(recipe, source=source))
    corpus = attempt(lambda: context.corpus)
    if corpus is None:
        raise _together(found)
    tokens = {domain: corpus.manifests[domain].train.tokens for domain in corpus.domains}
    attempt(lambda: context.outside)
    weights = attempt(lambda: context.initial_weights)
    if recipe.distill is not None:
        attempt(named(DISTILL_NAMES)(partial(require_domains, recipe.distill, domains=list(corpus.domains))))
        if set(recipe.training_stages) & set(stages):
            attempt(lambda: require_cached(context))
    attempt(lambda: require_reference(recipe, corpus=corpus))
    if found or weights is None:
        raise _together(found)
    gpus = _capacity(context, stages=stages, devices=devices or Devices.here(context.device), starts=starts)
    disk = max(0, run_bytes(recipe, source=source, target=target) - bytes_in(recipe.run_dir))
    largest = largest_weights(rule_of(recipe.mixture, prior=weights), prior=weights)
    plan = Plan(
        source=source,
        target=target,
        budget=None if recipe.target is None else recipe.target.parameters,
        zeros=zeros,
        teacher=None if recipe.distill is None else teacher_in_words(context),
        uniform=recipe.target is None or target is not None or recipe.target.uniform,
        tokens=tokens,
        weights=weights,
        largest=largest,
        training=list(_training(recipe, corpus=corpus, weights=weights, largest=largest)),
        doubts=[*doubts_of(recipe, source=source), *odd_sizes(recipe, source=source)],
        notes=[*gpus.notes, *said_of_architecture(target, config=config)],
        disk=disk,
        free=bytes_free(recipe.run_dir),
    )
    if plan.disk > plan.free:
        raise ShearingError(
            "run_dir",
            value=str(recipe.run_dir),
            allowed=f"{gigabytes(plan.disk)} of free disk; there are {gigabytes(plan.free)}",
            mend="choose a run_dir on another disk, or lower prune.keep_last and pretrain.keep_last",
        )
    return plan


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


def _training(
    recipe: Recipe, *, corpus: Corpus, weights: Mapping[str, float], largest: Mapping[str, float]
) -> Iterator[TrainingPlan]:
    length, mixture = recipe.data.sequence_length, recipe.mixture
    shares = heldout_shares(recipe)
    for stage, settings in recipe.training_stages.items():
        interval = "interval" if stage == "prune" else "pretrain_interval"
        lower = (
            f"mixture.losses=training (no held-out updates), a longer mixture.{interval} (now "
            f"{getattr(mixture, interval)}), or a smaller mixture.heldout_tokens (now "
            f"{recipe.heldout_tokens(domains=len(corpus.domains)):,})"
        )
        steps, per_step = settings.total_steps(sequence_length=length), settings.tokens_per_step(sequence_length=length)
        rows = steps * per_step // length
        passes, most_passes = (
            {name: rows * each[name] / corpus.train_rows(name, sequence_length=length) for name in corpus.domains}
            for each in (weights, largest)
        )
        yield TrainingPlan(
            stage=stage,
            steps=steps,
            tokens_per_step=per_step,
            heldout_share=shares[stage],
            lower=lower,
            passes=passes,
            most_passes=most_passes,
        )


def _together(errors: Sequence[ShearingError]) -> ShearingError:
    return errors[0] if len(errors) == 1 else CombinedShearingError(errors)
