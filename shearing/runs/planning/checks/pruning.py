"""What is cut, to which shape, by which scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from shearing.data.corpus.corpus import Corpus
from shearing.data.documents import DocumentRules
from shearing.data.mixture.reference import measured_conditions, resolve_reference
from shearing.errors import ShearingError, named
from shearing.models.loading import skeleton
from shearing.models.serving import BLOCK
from shearing.models.shape import Shape, other_architecture, resolve_target
from shearing.models.stored.companions import folder_of
from shearing.models.stored.kept_tokens import require_cuttable
from shearing.pruning.rotation.basis import require_rotatable
from shearing.pruning.rotation.tied import require_place_for_gain
from shearing.pruning.structured.granularities import PRUNED_BY, require_granularities, smallest_shape
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.registry import metric_of
from shearing.pruning.structured.mask_settings import MaskSettings, doubts
from shearing.runs.continuation.family import importance_of
from shearing.runs.names import COMPONENT_NAMES
from shearing.runs.planning.summary import written_as
from shearing.runs.recipe import Pruning, Recipe

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
