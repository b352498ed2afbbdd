"""What is cut, to which shape, by which scores."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from shearing.data.corpus.corpus import Corpus
from shearing.data.documents import DocumentRules
from shearing.data.mixture.reference import measured_conditions, resolve_reference
from shearing.errors import ShearingError, named
from shearing.models.loading import skeleton
from shearing.models.serving import BLOCK
from shearing.models.shape import Shape, config_for, other_architecture, resolve_target
from shearing.models.stored.companions import folder_of
from shearing.models.stored.kept_tokens import require_cuttable
from shearing.objectives.objective import PARAMETER_PREFIX
from shearing.pruning.rotation.basis import require_rotatable
from shearing.pruning.rotation.tied import require_place_for_gain
from shearing.pruning.structured.granularities import PRUNED_BY, require_granularities, smallest_shape
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.registry import metric_of
from shearing.pruning.structured.mask_settings import MaskSettings, doubts
from shearing.runs.continuation.cascade import cascade_of, require_shrinking
from shearing.runs.continuation.family import importance_of
from shearing.runs.names import COMPONENT_NAMES
from shearing.runs.planning.summary import written_as
from shearing.runs.recipe import Pruning, Recipe
from shearing.runs.run_directory import RunDirectory
from shearing.training.checkpoints.checkpoints import checkpoints_in
from shearing.training.checkpoints.pieces import ShardedState

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def target_of(pruning: Pruning, *, config: PretrainedConfig) -> Shape | None:
    """The target shape, or None for a budget."""
    source, chosen, wanted = Shape.of(config), pruning.prune.granularities, pruning.target
    require_granularities(chosen, source=source)
    if wanted.parameters is not None:
        smallest = smallest_shape(chosen, source=source).num_parameters()
        if not smallest <= wanted.parameters < source.num_parameters():
            raise ShearingError(
                "target.parameters",
                value=wanted.parameters,
                allowed=f"from {smallest:,}, where these granularities have cut all they can, "
                f"to fewer than the source's {source.num_parameters():,}",
                mend="choose a budget in between",
            )
        return None
    require_granularities(chosen, source=source)
    target = resolve_target(wanted, source=config)
    for size, granularities in PRUNED_BY.items():
        if getattr(target, size) != getattr(source, size) and not set(granularities) & set(chosen):
            raise ShearingError(
                "prune.granularities",
                value=chosen,
                allowed=f"{' or '.join(granularities)} among them: the target's {size} is {getattr(target, size)}, "
                f"the source's {getattr(source, size)}",
                mend=f"add {granularities[0]}, or leave that size as it is",
            )
    if target == source:
        raise ShearingError(
            "target", value=target.sizes(), allowed="at least one size below the source's", mend="choose a smaller size"
        )
    return target


def targets_of(recipe: Recipe, *, config: PretrainedConfig) -> list[Shape | None]:
    """The target shapes of a recipe's runs in order, None for a budget; none where nothing is cut.

    What follows a budget, whose sizes are learned, is checked against what that is cut from, which is larger.

    Args:
        recipe: of one run, or of a cascade.
        config: of the first source, as masks and cutting see it.

    Raises:
        ShearingError: one cannot be reached; of a run on the way, it is named.
    """
    if recipe.prune is None:
        return []
    require_shrinking(recipe, source=config)
    names = [] if recipe.cascade is None else list(recipe.cascade.targets)
    found: list[Shape | None] = []
    for each, name in zip_longest(cascade_of(recipe), names):
        try:
            target = target_of(each.pruning, config=config)
        except ShearingError as error:
            if name is None:
                raise
            raise ShearingError(
                f"cascade.targets.{name} ({error.field})", value=error.value, allowed=error.allowed, mend=error.mend
            ) from None
        found.append(target)
        if target is not None:
            config = config_for(config, shape=target, attention_layers=range(target.num_hidden_layers))
    return found


@named(COMPONENT_NAMES)
def require_vocabulary(recipe: Recipe) -> None:
    """A vocabulary that is cut in the end can be."""
    if recipe.target is not None and recipe.target.vocab_size is not None:
        folder = folder_of(recipe.model.source, revision=recipe.model.revision)
        require_cuttable(folder, size=recipe.target.vocab_size)


def require_metric(recipe: Recipe, *, source: Shape) -> None:
    """What grades the initial masks is for models of this family."""
    if recipe.prune is not None and (metric := recipe.prune.graded_by) is not None:
        metric_of(metric).units_of_work(source, evidence=Evidence())
    if recipe.family is not None:
        with named({"initial_masks": "family.importance"}):
            metric_of(importance_of(recipe, family=recipe.family)).units_of_work(source, evidence=Evidence())


def require_baselines(recipe: Recipe, *, source: Shape) -> None:
    """What chooses the units of baselines is for models of this family."""
    baselines = {} if recipe.prune is None else recipe.evaluation.by_name()

    def refusal(metric: str) -> ShearingError | None:
        try:
            metric_of(metric).units_of_work(source, evidence=Evidence())
        except ShearingError as error:
            return error
        return None

    found = {name: refusal(each.metric) for name, each in baselines.items()}
    refused = {name: error for name, error in found.items() if error is not None}
    if refused:
        left = ", ".join(name for name in baselines if name not in refused)
        raise ShearingError(
            "evaluation.baselines",
            value=list(refused),
            allowed="; ".join(dict.fromkeys(error.allowed for error in refused.values())),
            mend=f"set evaluation.baselines=[{left}]",
        )


def require_rotation(recipe: Recipe, *, source: Shape, target: Shape | None) -> None:
    """A source model that is to be rotated can be."""
    if recipe.prune is not None and recipe.prune.rotate != "none":
        require_rotatable(source.family)
        require_place_for_gain(source, prune=recipe.prune, target=target)


def last_checkpoint(recipe: Recipe) -> Path | None:
    """The end of the run that has trained the source, whose optimiser's state goes on; None: it starts from nothing.

    Raises:
        ShearingError: that run has not ended.
    """
    if recipe.prune is None or recipe.prune.moments_of is None:
        return None
    run = RunDirectory(recipe.prune.moments_of)
    found = checkpoints_in(run.checkpoints("pretrain"))
    if not found or not run.is_complete("pretrain"):
        raise no_moments(str(recipe.prune.moments_of))
    return found[max(found)]


def no_moments(found: str) -> ShearingError:
    """That there is no whole state of the optimiser which could go on."""
    return ShearingError(
        "prune.moments_of",
        value=found,
        allowed="the folder of a run whose pretrain is complete, with its last checkpoint",
        mend="run that one to its end, or set prune.moments_of=null",
    )


def require_moments(recipe: Recipe, *, config: PretrainedConfig) -> None:
    """The optimiser's state that goes on is of the source's weights, as far as their shapes say so."""
    if RunDirectory(recipe.run_dir).is_complete("prune") or (last := last_checkpoint(recipe)) is None:
        return
    try:
        saved = ShardedState(last).shapes
    except ShearingError as error:
        raise no_moments(f"{last}, which is damaged: {Path(error.field).name}: {error.value}") from None
    own = {f"{PARAMETER_PREFIX}{name}": tuple(each.shape) for name, each in skeleton(config).named_parameters()}
    if different := sorted(name for name in saved | own if saved.get(name) != own.get(name)):
        first = different[0]
        raise ShearingError(
            "prune.moments_of",
            value=f"{last}, in which {first.removeprefix(PARAMETER_PREFIX)} is {_in_words(saved.get(first))}",
            allowed=f"the run that has trained all weights of the source, in which it is {_in_words(own.get(first))}",
            mend="set prune.moments_of=null: the optimiser then starts anew",
        )


def _in_words(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else f"of shape {list(shape)}"


def require_reference(recipe: Recipe, *, corpus: Corpus) -> list[str]:
    """Losses from a file are of this tokenizer, sequence length and labels; what else is doubtful, a sentence each."""
    reference, data = recipe.mixture.reference, recipe.data
    if reference not in ("source", "online", "teacher"):
        resolve_reference(
            recipe.mixture,
            domains=corpus.domains,
            measure_source=dict,
            conditions={
                "tokenizer_fingerprint": next(iter(corpus.manifests.values())).tokenizer_fingerprint,
                "sequence_length": data.sequence_length,
                "loss_across_documents": DocumentRules(loss_across=data.loss_across_documents)
                .heeding(corpus.bos)
                .loss_across,
            },
        )
    measured = measured_conditions(reference).get("attention") if isinstance(reference, Path) else None
    if measured in (None, data.attention):
        return []
    return [f"{reference} was measured with data.attention={measured}, this run has {data.attention}"]


def doubts_of(recipe: Recipe, *, source: Shape, target: Shape | None) -> Iterator[str]:
    """What may go otherwise than people expect, a sentence each."""
    if recipe.prune is not None:
        if recipe.prune.rotate != "none" and source.tied:
            head = source.vocab_size * (source if target is None else target).hidden_size
            yield (
                f"prune.rotate_tied=untie: the head becomes a matrix of its own, {head:,} of the result's parameters"
                if recipe.prune.unties
                else "prune.rotate_tied=diagonal: the last norm's gain is fitted, which changes logits"
            )
        if source.num_experts and recipe.prune.refits(sequence_length=recipe.data.sequence_length):
            yield (
                "prune.compensate refits what stays of the attention alone: experts and routers stay as they are, and "
                "what goes of them is made up for in training"
            )
        if recipe.prune.masks == "learned":
            per_step = recipe.prune.tokens_per_step(sequence_length=recipe.data.sequence_length)
            settings = MaskSettings.of(recipe.prune, tokens_per_step=per_step, seed=recipe.seed)
            yield from doubts(settings, opens=recipe.prune.initial_masks == "open")


def odd_sizes(recipe: Recipe, *, source: Shape) -> Iterator[str]:
    """Widths by name that other programs will not like, where the source's are better."""
    for name in ("hidden_size", "intermediate_size"):
        size = None if recipe.target is None else getattr(recipe.target, name)
        if size is not None and size % BLOCK and not getattr(source, name) % BLOCK:
            near = max(BLOCK, round(size / BLOCK) * BLOCK)
            yield (
                f"target.{name} = {size} is no multiple of {BLOCK}, by which quantisers store and GPUs multiply; "
                f"{near} is, and 64 or 256 suit more of them (docs/compatibility.md)"
            )


def said_of_architecture(target: Shape | None, *, config: PretrainedConfig) -> Iterator[str]:
    """A result of another architecture than the source's, in words; nothing where it is the same."""
    if target is not None and (other := other_architecture(target, source=config)) is not None:
        yield written_as(other, instead_of=type(skeleton(config)).__name__)
