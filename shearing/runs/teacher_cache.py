"""`shear data teacher`: keep what a model says of a corpus' rows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedModel

from shearing.data.corpus.bos import BosChoice, require_bos
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.errors import ShearingError, named
from shearing.files.durable import locked, require_writable
from shearing.files.full_disk import full_disk_said
from shearing.files.refusals import said_of_file
from shearing.models.attention import drop_attention_mask, keep_attention_within_documents
from shearing.models.loading import load_config, load_source, require_weights
from shearing.models.stored.stored_model import stored_fingerprint
from shearing.models.tokenizer import begin_tokens, load_tokenizer
from shearing.objectives.teacher_cache.cache import Conditions, TeacherCache
from shearing.objectives.teacher_cache.draws import MOST_DRAWS, Draws
from shearing.objectives.teacher_cache.form import Form
from shearing.objectives.teacher_cache.top_k import TopK
from shearing.objectives.teacher_cache.writing import (
    PIECE_TOKENS,
    Plan,
    missing_parts,
    rows_per_piece,
    with_rows_there,
    write_cache,
)
from shearing.processes.processes import Processes
from shearing.progress import activity
from shearing.runs.context import RunContext
from shearing.runs.continuation.cascade import cascade_of
from shearing.runs.planning.rows import Rows, rows_read
from shearing.runs.recipe import Recipe
from shearing.training.device import keep_freed_memory, resolve_device, resolve_precision
from shearing.training.recipe import TrainingRecipe

WRITE_NAMES: Mapping[str, str] = {
    "source": "--model",
    "model": "--model",
    "revision": "--revision",
    "corpus": "CORPUS",
    "domains": "--domain",
    "output": "--output",
    "sequence_length": "--sequence-length",
    "bos": "--bos",
    "device": "--device",
    "precision": "--precision",
}
"""What components call, by the options of `shear data teacher`."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be kept of which rows.

    Attributes:
        model, revision: the teacher.
        corpus: folder of a prepared corpus.
        output: folder of the cache.
        domains: of the corpus; None: all.
        sequence_length: inputs of a row.
        attention: see `DataRecipe`.
        bos: how the corpus is to begin texts, see `DataRecipe`.
        attn_implementation: see `ModelRecipe`.
        draws: a token; or
        top_k: likeliest tokens instead.
        seed: of the draws.
        rows: the first so many of each domain; or
        recipe: those alone that its run will read, or all runs of its cascade; None: all.
        micro_batch_size: rows that the teacher reads at a time.
        training: where and in which precision.
        piece_tokens: of a file, about.
    """

    model: str
    revision: str | None = None
    corpus: Path
    output: Path
    domains: Sequence[str] | None = None
    sequence_length: int
    attention: Literal["full", "documents"] = "full"
    bos: BosChoice = "auto"
    attn_implementation: str = "sdpa"
    draws: int = 50
    top_k: int | None = None
    seed: int = 0
    rows: int | None = None
    recipe: Recipe | None = None
    micro_batch_size: int = 4
    training: TrainingRecipe
    piece_tokens: int = PIECE_TOKENS


@named(WRITE_NAMES)
def write(asked: Asked, *, console: Console | None = None) -> TeacherCache:
    """Ask the teacher of all rows that are not in the cache yet, and open the whole of it; what is in it stays there.

    Where a launcher started several processes, each of them calls this.

    Args:
        asked: what is to be kept.
        console: where progress goes; stdout if None. Only the main process prints.

    Raises:
        ShearingError: a model that is none, cannot take the sequence length, has another tokenizer than the corpus or
            begins texts otherwise; a folder with a cache of something else; a full disk.
    """
    _require_numbers(asked)
    training = asked.training
    with Processes.start(
        device=training.device, timeout=training.timeout, names=WRITE_NAMES, mendable=said_of_file
    ) as processes:
        console = (console or Console()) if processes.is_main else Console(quiet=True)
        device = resolve_device(training.device)
        keep_freed_memory(device, processes=processes.size)
        precision = resolve_precision(training, device=device)
        require_writable(asked.output, field="output")
        corpus = Corpus.open(asked.corpus, domains=asked.domains, sequence_length=asked.sequence_length)
        if corpus.notice:
            console.print(corpus.notice, style="yellow", soft_wrap=True, highlight=False)
        config = _fitting_config(asked, corpus=corpus)
        plan = Plan(
            folder=asked.output,
            corpus=corpus,
            conditions=Conditions(
                teacher=processes.on_main(lambda: stored_fingerprint(asked.model, revision=asked.revision)),
                vocab_size=config.vocab_size,
                sequence_length=asked.sequence_length,
                attention=asked.attention,
                precision="bf16" if precision == torch.bfloat16 else "fp32",
                form=_form(asked, vocab_size=config.vocab_size),
            ),
            name=asked.model,
            rows=_rows(asked, corpus=corpus),
            rows_per_piece=rows_per_piece(asked.sequence_length, piece_tokens=asked.piece_tokens),
        )

        def teacher() -> PreTrainedModel:
            model = load_source(
                asked.model,
                revision=asked.revision,
                attn_implementation=asked.attn_implementation,
                device=device,
                dtype=precision,
            )
            if asked.attention == "documents":
                keep_attention_within_documents(model)
            else:
                drop_attention_mask(model, sequence_length=asked.sequence_length)
            return model

        held = locked(asked.output, field="output") if processes.is_main else contextlib.nullcontext()
        with held, full_disk_said(lambda: _no_room(asked.output)):
            plan = replace(plan, rows=processes.on_main(lambda: with_rows_there(plan)))
            missing = processes.on_main(lambda: missing_parts(plan))
            share = missing[processes.rank :: processes.size]
            own = sum(len(part.unasked()) for part in share) * asked.sequence_length
            with activity(f"asking {asked.model}", total=own, console=console) as advance:
                write_cache(
                    plan,
                    missing=missing,
                    teacher=teacher,
                    micro_batch_size=asked.micro_batch_size,
                    processes=processes,
                    advance=advance,
                )
        cache = TeacherCache.open(asked.output)
        console.print(
            f"{asked.output}: {cache.tokens:,} tokens, {cache.bytes / cache.tokens:.1f} bytes each "
            f"({cache.conditions.form.words}): for distill.cache",
            soft_wrap=True,
            highlight=False,
        )
        return cache


def verify(path: Path, *, console: Console) -> list[ShearingError]:
    """Read all of a cache; every file that is not what was written.

    Raises:
        ShearingError: it cannot be opened.
    """
    with named({"cache": "--output"}):
        cache = TeacherCache.open(path)
    with activity(f"reading {path}", total=cache.bytes, console=console) as advance:
        return list(cache.damages(advance=advance))


def _rows(asked: Asked, *, corpus: Corpus) -> dict[str, Rows]:
    if asked.recipe is None:
        there = {name: corpus.train_rows(name, sequence_length=asked.sequence_length) for name in corpus.domains}
        return {
            name: np.arange(count if asked.rows is None else min(asked.rows, count)) for name, count in there.items()
        }
    # The models on the way of a cascade are not there yet; which rows are read does not depend on them.
    contexts = [
        RunContext(each.model_copy(update={"model": asked.recipe.model}), console=Console(quiet=True))
        for each in cascade_of(asked.recipe)
    ]
    context = contexts[0]
    by_run = [rows for each in contexts if (rows := rows_read(each)) is not None]
    if len(by_run) < len(contexts):
        raise ShearingError(
            "--recipe",
            value=f"mixture.update={asked.recipe.mixture.update}",
            allowed="mixture.update=constant: which rows are read depends on losses otherwise",
            mend="leave --recipe out, for all rows; or keep the first rows of each domain (--rows) and train with "
            "distill.cache_missing=compute",
        )
    own = {name: corpus.manifests[name].train for name in corpus.domains}
    if context.recipe.data.sequence_length != asked.sequence_length or own != {
        name: manifest.train for name, manifest in context.corpus.manifests.items()
    }:
        raise ShearingError(
            "--recipe",
            value=f"{context.recipe.data.corpus} at sequence length {context.recipe.data.sequence_length}",
            allowed=f"the same domains of the same text as CORPUS, {corpus.path}, at {asked.sequence_length}",
            mend="name the recipe's corpus, domains (--domain) and sequence length (--sequence-length)",
        )
    return {domain: np.unique(np.concatenate([rows[domain] for rows in by_run])) for domain in own}


def _form(asked: Asked, *, vocab_size: int) -> Form:
    if asked.top_k is None:
        return Draws(draws=asked.draws, seed=asked.seed)
    if asked.top_k >= vocab_size:
        raise ShearingError(
            "--top-k",
            value=asked.top_k,
            allowed=f"fewer than the vocabulary's {vocab_size} tokens",
            mend="lower it, or keep draws",
        )
    return TopK(top_k=asked.top_k)


def _require_numbers(asked: Asked) -> None:
    least = {
        "--sequence-length": (asked.sequence_length, 2),
        "--draws": (asked.draws, 1),
        "--top-k": (asked.top_k, 1),
        "--rows": (asked.rows, 1),
        "--micro-batch-size": (asked.micro_batch_size, 1),
        "--seed": (asked.seed, 0),
    }
    for option, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise ShearingError(option, value=value, allowed=f"at least {lowest}", mend="raise it")
    if asked.draws > MOST_DRAWS:
        raise ShearingError(
            "--draws", value=asked.draws, allowed=f"at most {MOST_DRAWS}", mend="lower it: 50 are as good as all"
        )
    if asked.rows is not None and asked.recipe is not None:
        raise ShearingError("--rows", value=asked.rows, allowed="nothing beside --recipe", mend="leave one out")


def _fitting_config(asked: Asked, *, corpus: Corpus) -> PretrainedConfig:
    """The teacher's config.

    Raises:
        ShearingError: it has nothing to say of this text.
    """
    config = load_config(asked.model, revision=asked.revision)
    require_weights(asked.model, revision=asked.revision)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and asked.sequence_length > limit:
        raise ShearingError(
            "--sequence-length",
            value=asked.sequence_length,
            allowed=f"at most {limit}, the positions of {asked.model}",
            mend=f"--sequence-length {limit}, in the recipe too",
        )
    tokenizer = load_tokenizer(asked.model, revision=asked.revision)
    own = tokenizer_fingerprint(tokenizer)
    for name, manifest in corpus.manifests.items():
        if manifest.tokenizer_fingerprint != own or manifest.largest_token >= config.vocab_size:
            raise ShearingError(
                "--model",
                value=f"{asked.model} (tokenizer {own}, vocabulary {config.vocab_size})",
                allowed=f"a model with the tokenizer of the corpus, {manifest.tokenizer} "
                f"({manifest.tokenizer_fingerprint}, domain {name})",
                mend="choose a teacher of this tokenizer, or prepare the text with the teacher's",
            )
    begin = begin_tokens(tokenizer)
    require_bos(corpus.bos, choice=asked.bos, front=begin.front, named=begin.named, corpus=str(corpus.path))
    return config


def _no_room(folder: Path) -> ShearingError:
    return ShearingError(
        "output",
        value=str(folder),
        allowed="a disk with room for the cache: about 45 bytes a token for 50 draws",
        mend="make room and repeat the command, which goes on where it was; or keep fewer rows (--rows)",
    )
