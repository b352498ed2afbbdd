"""`shear export`: any state of a run, or a model, as a Hugging Face folder that has been opened and compared."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers import PreTrainedModel

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.errors import ShearingError, named
from shearing.evaluation.environment import environment
from shearing.files.durable import flush_folder, flush_tree, require_new, require_writable
from shearing.files.full_disk import full_disk_said, no_room_for_model
from shearing.models.loading import load_config
from shearing.models.serving import misfits
from shearing.models.shape import Shape
from shearing.models.stored.companions import copy_companions
from shearing.models.stored.kept_tokens import require_cuttable
from shearing.models.stored.saving import DTYPES, SHARD_BYTES, round_weights, write_model
from shearing.models.tokenizer import load_tokenizer
from shearing.pruning.sparse.stored.trained import write_trained
from shearing.runs.export.card import write_card
from shearing.runs.export.check import difference, logits_of, opened, require_same
from shearing.runs.export.gguf_file import (
    context_of,
    opened_gguf,
    require_convertible,
    require_gguf,
    round_as,
    write_gguf,
)
from shearing.runs.export.hub import files_to_push, push, require_repository_name
from shearing.runs.export.origin import Origin, open_origin
from shearing.runs.export.vocabulary import CutVocabulary, cut_to_corpus
from shearing.runs.stages.pretraining.start import way_of
from shearing.settings.quantities import format_parameters

NAMES = {
    "model": "MODEL",
    "vocab_size": "--vocab-size",
    "source": "MODEL",
    "save_dtype": "--dtype",
    "model.source": "MODEL",
}


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file of an export.

    Attributes:
        name: in the folder.
        rounding: what its kind moves logits by, relatively.
        limits: what holds with limits only, a sentence each.
    """

    name: str
    rounding: float
    limits: list[str]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A folder that was written.

    Attributes:
        folder: of the model.
        shape: its sizes.
        dtype: its weights', in the words of settings.
        difference: of fp32 logits, relative: the folder's to those of training.
        rounding: the share of it that comes from the dtype; 0 in fp32.
        misfits: what about the sizes does not suit other programs, a sentence each.
        vocabulary: what stayed of it; None: all.
        gguf: the GGUF file in it; None: none was asked for.
        address: of the commit on the hub; None: it was not pushed.
    """

    folder: Path
    shape: Shape
    dtype: str
    difference: float
    rounding: float
    misfits: list[str]
    vocabulary: CutVocabulary | None = None
    gguf: GgufFile | None = None
    address: str | None = None


@named(NAMES)
def export(
    target: str,
    *,
    output: Path,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    revision: str | None = None,
    repository: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    gguf: str | None = None,
    vocab_size: int | str | None = None,
    corpus: Path | None = None,
    console: Console | None = None,
) -> Exported:
    """Write a model, open it with transformers alone, compare its logits with those of training, and perhaps push it.

    Args:
        target: a run, a checkpoint of its continued pretraining, a model's folder or a hub name; see `open_origin`.
        output: folder to make; it appears as a whole, after everything was compared, or not at all.
        dtype: fp32, bf16 or fp16, of the weights; the source's (of a run, `model.save_dtype`) if None.
        shard_bytes: of the largest file of weights.
        revision: of a hub name.
        repository: of a hub, to push to; None: nothing is pushed.
        private: whether a new repository is for its owners alone.
        dry_run: say what would be pushed, and push nothing.
        gguf: f32, f16, bf16 or q8_0: writes a GGUF file of that kind into the folder too; see `write_gguf`.
        vocab_size: rows of the embedding that stay, or `auto`: see `cut_to_corpus`; None: all.
        corpus: whose tokens stay, where a vocabulary is cut; that of the run if None.
        console: where results go; stdout if None.

    Raises:
        ShearingError: there is nothing of that kind, the folder is there, logits differ, llama.cpp cannot have such a
            model, or the hub refuses.
    """
    console = console or Console()
    _require_options(output=output, dtype=dtype, shard_bytes=shard_bytes)
    if gguf is not None:
        require_gguf(gguf)
    if repository is not None:
        require_repository_name(repository)
    transformers.utils.logging.disable_progress_bar()
    origin = open_origin(target, revision=revision)
    if gguf is not None:
        config = load_config(origin.start.source, revision=origin.start.revision)
        require_convertible(config, folder=origin.start.folder)
    name = dtype or next(name for name, of in DTYPES.items() if of == origin.dtype())
    wish = _Wish(
        to=output,
        dtype=name,
        shard_bytes=shard_bytes,
        gguf=gguf,
        vocab_size=vocab_size,
        corpus=None if vocab_size is None else _corpus(origin, path=corpus, size=vocab_size),
    )
    beside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with full_disk_said(lambda: no_room_for_model(output, field="--output")):
            made = _written(origin, beside, wish=wish)
            flush_tree(beside)
            beside.rename(output)
            flush_folder(output.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _say(made, origin=origin, console=console)
    if repository is None:
        return made
    if dry_run:
        console.print(f"would be pushed to {repository}:", soft_wrap=True, highlight=False)
        for line in files_to_push(output):
            console.print(line, soft_wrap=True, highlight=False)
        return made
    message = f"{origin.name}{'' if origin.step is None else f', step {origin.step:,}'}, in {name}"
    address = push(output, repository=repository, private=private, message=message)
    console.print(f"pushed: {address}", soft_wrap=True, highlight=False)
    return dataclasses.replace(made, address=address)


@dataclass(frozen=True, kw_only=True)
class _Wish:
    """How a folder is to be, beyond what it is made of.

    Attributes:
        to: where it will be.
        dtype, shard_bytes, gguf, vocab_size: see `export`.
        corpus: whose tokens stay.
    """

    to: Path
    dtype: str
    shard_bytes: int
    gguf: str | None
    vocab_size: int | str | None
    corpus: Corpus | None


def _written(origin: Origin, beside: Path, *, wish: _Wish) -> Exported:
    start = origin.start
    training = origin.model()
    trained = logits_of(training)
    model = start.merged(training)
    if origin.adapters is not None:
        require_same(logits_of(model), expected=trained, what="adapters merged and beside the weights")
    model.config.use_cache = True
    write_model(model, beside, dtype=DTYPES[wish.dtype], shard_bytes=wish.shard_bytes)
    copy_companions(start.folder, to=beside)
    round_weights(model, dtype=DTYPES[wish.dtype])
    rounded = logits_of(model)
    del model, training
    again = opened(beside)
    found = logits_of(again)
    require_same(found, expected=rounded, what=f"{wish.to} and what it was written from")
    cut = None
    if wish.vocab_size is not None and wish.corpus is not None:
        cut = cut_to_corpus(beside, corpus=wish.corpus, size=wish.vocab_size, whole=again, masks=start.masks)
        again = opened(beside)
    if start.masks is not None:
        write_trained(beside, source=start.folder, record=_record(origin), moved=origin.moved)
    shape = Shape.of(again.config)
    if origin.context is not None:
        versions = environment(torch.device("cpu"))
        write_card(beside, origin=origin, shape=shape, dtype=wish.dtype, versions=versions, vocabulary=cut)
    return Exported(
        folder=wish.to,
        shape=shape,
        dtype=wish.dtype,
        difference=difference(found, trained),
        rounding=difference(rounded, trained),
        misfits=misfits(shape),
        vocabulary=cut,
        gguf=None if wish.gguf is None else _write_gguf(again, beside, kind=wish.gguf),
    )


def _corpus(origin: Origin, *, path: Path | None, size: int | str) -> Corpus:
    """The text whose tokens stay, checked against the model's tokenizer, which can be cut."""
    require_cuttable(origin.start.folder, size=size)
    if path is None and origin.context is not None:
        return origin.context.corpus
    if path is None:
        raise ShearingError(
            "--corpus",
            value=None,
            allowed="a corpus with --vocab-size, unless a run is exported: its tokens stay",
            mend="prepare one with the model's tokenizer, `shear data prepare`, and name its folder",
        )
    config = load_config(origin.start.source, revision=origin.start.revision)
    tokenizer = load_tokenizer(origin.start.source, revision=origin.start.revision)
    fingerprint = tokenizer_fingerprint(tokenizer)
    with named({"corpus": "--corpus"}):
        return Corpus.open(path, vocab_size=config.vocab_size, tokenizer_fingerprint=fingerprint)


def _write_gguf(model: PreTrainedModel, folder: Path, *, kind: str) -> GgufFile:
    """Write a folder's model as a GGUF file, and compare what transformers reads there; the model is rounded."""
    path, context = folder / f"model-{kind}.gguf", context_of(model.config)
    exact = logits_of(model, context=context)
    limits = write_gguf(model, path, folder=folder, kind=kind)
    round_as(model, kind=kind)
    rounded = logits_of(model, context=context)
    found = logits_of(opened_gguf(path, config=model.config), context=context)
    require_same(found, expected=rounded, what=f"{path.name} and what it was written from")
    return GgufFile(path.name, difference(rounded, exact), limits)


def _record(origin: Origin) -> dict[str, object] | None:
    """What a sparse model's manifest says of the training between its masks and this state."""
    if origin.checkpoint is None or origin.step is None or origin.context is None:
        return None
    recipe = origin.context.recipe
    return {
        "steps": origin.step,
        "tokens": origin.step * recipe.pretrain.tokens_per_step(sequence_length=recipe.data.sequence_length),
        **way_of(recipe.pretrain),
        "versions": environment(torch.device("cpu")),
    }


def _say(made: Exported, *, origin: Origin, console: Console) -> None:
    parameters = format_parameters(made.shape.num_parameters())
    console.print(f"{origin.title}: {parameters} parameters in {made.dtype}", soft_wrap=True, highlight=False)
    rounding = f"; rounding to {made.dtype} moves them by {made.rounding:.1e}" if made.rounding else ""
    console.print(f"opened with transformers: logits are those that were written{rounding}", highlight=False)
    if made.vocabulary is not None:
        console.print(str(made.vocabulary), soft_wrap=True, highlight=False)
    if made.gguf is not None:
        moved = f": rounding moves logits by {made.gguf.rounding:.1e}" if made.gguf.rounding else ""
        console.print(f"{made.gguf.name}, opened with transformers too{moved}", soft_wrap=True, highlight=False)
        for limit in made.gguf.limits:
            console.print(f"{made.gguf.name}: {limit}", style="yellow", soft_wrap=True, highlight=False)
    for misfit in made.misfits:
        console.print(f"does not suit {misfit}", style="yellow", soft_wrap=True, highlight=False)
    console.print(f"exported model: {made.folder}", soft_wrap=True, highlight=False)


def _require_options(*, output: Path, dtype: str | None, shard_bytes: int) -> None:
    require_new(output, field="--output")
    require_writable(output, field="--output")
    if dtype is not None and dtype not in DTYPES:
        raise ShearingError(
            "--dtype", value=dtype, allowed=", ".join(DTYPES), mend="choose one of them, or leave it out"
        )
    if shard_bytes < 1:
        raise ShearingError("--shard-size", value=shard_bytes, allowed="at least 1 byte", mend="write it as '5 GB'")
