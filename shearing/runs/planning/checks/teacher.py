"""The model that is listened to, and the cache of what it said."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.errors import ShearingError, named
from shearing.models.loading import require_weights
from shearing.models.shape import Shape
from shearing.models.stored.stored_model import require_finite
from shearing.models.tokenizer import load_tokenizer
from shearing.runs.context import RunContext
from shearing.runs.names import TEACHER_NAMES
from shearing.runs.planning.rows import rows_read
from shearing.training.engines.fsdp2_engine import require_fsdp2


def require_teacher(context: RunContext) -> None:
    """The model that is listened to says something of the same tokens, and its weights can be had.

    Raises:
        ShearingError: it has another vocabulary or tokenizer, reads too short a sequence, or its weights are not
            those of its config, or not finite.
    """
    recipe, config = context.recipe, context.teacher_config
    if recipe.distill is None or config is None or recipe.teacher is None:
        return
    said = recipe.distill.teacher

    def refuse(value: object, allowed: str, mend: str) -> ShearingError:
        return ShearingError("distill.teacher", value=f"{said}: {value}", allowed=allowed, mend=mend)

    if config.vocab_size != context.config.vocab_size:
        raise refuse(
            f"a vocabulary of {config.vocab_size:,} tokens",
            f"the source model's, of {context.config.vocab_size:,}: distributions are compared token by token",
            "choose a teacher of the same tokenizer, or leave distill.teacher out for the source model",
        )
    length, limit = recipe.data.sequence_length, getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise refuse(f"{limit} positions", f"at least data.sequence_length={length}", "choose another teacher")
    if recipe.distill.kind == "top_k" and recipe.distill.top_k >= config.vocab_size:
        raise ShearingError(
            "distill.top_k",
            value=recipe.distill.top_k,
            allowed=f"fewer than the vocabulary's {config.vocab_size} tokens",
            mend="lower it, or set distill.kind=forward_kl, which keeps all",
        )
    if recipe.distill.placement == "shard":
        require_fsdp2()
        if recipe.distill.cache is not None:
            raise ShearingError(
                "distill.placement",
                value="shard",
                allowed="replicate or offload with distill.cache: which rows are missing there each process finds by "
                "itself, and a teacher that is shared out runs on all of them or on none",
                mend="set distill.placement=replicate, or leave distill.cache out",
            )
    _require_matchable(context)
    if recipe.teacher == recipe.model:
        return  # what there is to check of the source model is checked where it is loaded
    with named(TEACHER_NAMES):
        tokenizer = load_tokenizer(recipe.teacher.source, revision=recipe.teacher.revision)
        if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(context.tokenizer):
            raise refuse(
                "another tokenizer than the source model's",
                "the same tokens under the same numbers",
                "choose a teacher of the same tokenizer, or leave distill.teacher out for the source model",
            )
        # Of one that is not loaded, when the cache was written.
        if recipe.listens_online:
            require_weights(recipe.teacher.source, revision=recipe.teacher.revision)
        # Of the hub's, when it is loaded.
        if Path(recipe.teacher.source).is_dir() and recipe.listens_online:
            require_finite(Path(recipe.teacher.source))


def _require_matchable(context: RunContext) -> None:
    """Where residual streams are matched, the teacher's is that of the source.

    Raises:
        ShearingError: it is of another family, depth or width, or has no such layer.
    """
    distill, source, teacher = context.recipe.distill, Shape.of(context.config), context.teacher_shape
    if distill is None or distill.hidden is None or teacher is None:
        return
    if _stream(teacher) != _stream(source):
        raise ShearingError(
            "distill.hidden",
            value=f"with the teacher {distill.teacher}: {_stream(teacher)}",
            allowed=f"a teacher whose residual stream is the source model's ({_stream(source)}): the source itself, or "
            "what was trained on from it",
            mend="leave distill.hidden out, or distill.teacher",
        )
    layers = distill.hidden.layers
    if not isinstance(layers, str) and (beyond := [layer for layer in layers if layer >= source.num_hidden_layers]):
        raise ShearingError(
            "distill.hidden.layers",
            value=beyond,
            allowed=f"layers of the source model: 0 to {source.num_hidden_layers - 1}",
            mend="leave them out, or write all",
        )


def _stream(shape: Shape) -> str:
    return f"{shape.family.model_type}, {shape.num_hidden_layers} layers, hidden size {shape.hidden_size}"


def require_cached(context: RunContext) -> None:
    """All rows that are known to be read are in the cache, where it has to be enough.

    Raises:
        ShearingError: they are not, or there is no such cache; see `RunContext.teacher_cache`.
    """
    recipe, cache = context.recipe, context.teacher_cache
    if cache is None or recipe.listens_online:
        return
    length = recipe.data.sequence_length
    sizes = {domain: context.corpus.train_rows(domain, sequence_length=length) for domain in context.corpus.domains}
    if all(cache.num_rows(domain) == size for domain, size in sizes.items()):
        return
    wanted = rows_read(context)
    if wanted is None:
        return  # which rows are read depends on losses: one that is missing is said when it is
    missing = {domain: len(np.setdiff1d(rows, cache.rows(domain))) for domain, rows in wanted.items()}
    if any(missing.values()):
        raise ShearingError(
            "distill.cache",
            value=f"{cache.path} without "
            + ", ".join(f"{count:,} rows of {domain}" for domain, count in missing.items() if count),
            allowed="all rows that this run reads, with distill.cache_missing=refuse",
            mend=f"write them: shear data teacher {recipe.data.corpus} --model {cache.name} --recipe RECIPE "
            f"-o {cache.path}; or set distill.cache_missing=compute, which loads the teacher",
        )


def teacher_in_words(context: RunContext) -> str:
    """The model that is listened to, and how much, for people."""
    distill, shape = context.recipe.distill, context.teacher_shape
    assert distill is not None
    assert shape is not None
    return (
        f"{distill.teacher}, {shape.num_parameters():,} parameters; {distill.kind} weighs {distill.weight:g} of the "
        f"loss at most" + ("" if distill.cache is None else f"; what it says is read from {distill.cache}")
    )
