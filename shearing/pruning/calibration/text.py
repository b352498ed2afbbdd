"""Calibration text: the first samples of a mixture, or rows of the texts in files drawn by a seed.

Legend: B sequences, S tokens each.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from shearing.data.corpus.bos import Bos, BosChoice, require_bos, resolve_bos
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import INDEX_NAME, tokenizer_fingerprint
from shearing.data.documents import IGNORED_LABEL, DocumentRules, Inputs
from shearing.data.mixture.sampler import Mixture
from shearing.data.texts.bad_input import BadInput
from shearing.data.texts.documents import TextFile
from shearing.data.texts.encoding import PlainTokenizer
from shearing.data.texts.kinds import kind_of, packages_of
from shearing.data.texts.reading import read_local_texts
from shearing.errors import ShearingError, named
from shearing.models.tokenizer import begin_tokens
from shearing.settings.extras import require_extra

READ_TIMES = 16
MAX_DOCUMENT_BYTES = 1 << 30


@dataclass(frozen=True)
class Calibration:
    """What the statistics are taken on; on the host.

    Attributes:
        tokens: int64 [samples, seqlen].
        source: where the text came from, for people.
        positions: int64 [samples, seqlen], tokens since the document began in its row, where attention stays within
            documents; None: all of a row attends to all before it.
        counted: bool [samples, seqlen], tokens that count as labels; None: all.
    """

    tokens: Tensor
    source: str
    positions: Tensor | None = None
    counted: Tensor | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, how they are cut and what is told of documents (hexadecimal, 32 digits)."""
        content = str(tuple(self.tokens.shape)).encode() + self.tokens.contiguous().numpy().tobytes()
        for name, told in (("positions", self.positions), ("counted", self.counted)):
            if told is not None:
                content += name.encode() + told.contiguous().numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:32]

    @property
    def attention_within(self) -> bool:
        """Whether tokens attend to those of their own document alone."""
        return self.positions is not None

    def part(self, rows: slice | list[int]) -> Calibration:
        """Some of the sequences."""
        positions, counted = (None if told is None else told[rows] for told in (self.positions, self.counted))
        return Calibration(self.tokens[rows], self.source, positions, counted)

    def inputs(self, rows: slice, *, device: torch.device) -> Inputs:
        """All tokens [B, S] of some sequences, to be read."""
        # Documents are told of inputs and a last label.
        positions_BT = None if self.positions is None else pad(self.positions[rows], (0, 1))
        documents = DocumentRules(attention_within=self.attention_within).documents(positions_BT, device=device)
        return Inputs(self.tokens[rows].to(device), documents)

    def predictions(self, rows: slice | list[int], *, device: torch.device) -> tuple[Inputs, Tensor]:
        """Of some sequences all tokens but the last [B, S - 1], and what they predict: `Documents.labels`."""
        told = self.part(rows)
        rules = DocumentRules(attention_within=self.attention_within)
        documents = rules.documents(told.positions, device=device, counted_BT=told.counted)
        tokens_BT = told.tokens.to(device)
        labels_BS = tokens_BT[:, 1:] if documents is None else documents.labels(tokens_BT)
        return Inputs(tokens_BT[:, :-1], documents), labels_BS


def num_counted(labels: Tensor) -> int:
    """How many labels count; 1 where none does, so that a mean of their losses is 0."""
    return max(1, int((labels != IGNORED_LABEL).sum()))


def load_calibration(
    paths: Sequence[Path],
    *,
    tokenizer: Any,
    vocab_size: int,
    samples: int,
    seqlen: int,
    seed: int,
    text_field: str = "text",
    corpus: Corpus | None = None,
    bos: BosChoice = "auto",
    documents: DocumentRules | None = None,
    more: int = 0,
) -> Calibration:
    """Rows of the training split of a corpus, domains by their share of the tokens; or of the texts in files.

    Files are read as preparation reads them, by their names: JSON, Parquet and Arrow hold documents; any other file is
    one. Each document ends in the tokenizer's end of text, and special tokens that it spells out are text. Of documents
    no more are read than make `READ_TIMES` as many tokens as are wanted.

    Args:
        paths: the folder of one corpus, or files.
        tokenizer: the model's.
        vocab_size: rows of the model's embedding.
        samples: number of rows.
        seqlen: tokens of a row.
        seed: of the draw; no row is drawn twice.
        text_field: of files with documents, the field that holds the text; see `TextFile`.
        corpus: the one at `paths`, with all its domains, where it is open already and known to fit the model.
        bos: how texts begin; auto: as the tokenizer does.
        documents: what their ends mean; None: nothing. What a corpus does not count is no label either way.
        more: rows behind those `samples`: others, which do not change them.

    Raises:
        ShearingError: no such text, tokens of another tokenizer, texts that begin otherwise, or too little of it.
    """
    where, rules = ", ".join(map(str, paths)), documents or DocumentRules()
    if len(paths) == 1 and paths[0].is_dir():
        corpus = corpus or _opened(paths[0], vocab_size=vocab_size, tokenizer=tokenizer, bos=bos)
        return _of_corpus(corpus, samples=samples + more, seqlen=seqlen, seed=seed, rules=rules, source=where)
    begin = begin_tokens(tokenizer)
    begun = resolve_bos(bos, front=begin.front, named=begin.named)
    stream, further = _documents_of(
        paths, tokenizer=tokenizer, bos=begun, samples=samples, more=more, seqlen=seqlen, text_field=text_field
    )
    _require_enough(stream.count + further.count, samples=samples + more, seqlen=seqlen, where=where)
    found = _drawn(stream, further, samples=samples + more, seed=seed, bos=begun, rules=rules, source=where)
    if int(found.tokens.max()) >= vocab_size:
        raise ShearingError(
            "calibration",
            value=f"token id {int(found.tokens.max())}",
            allowed=f"token ids below the model's vocabulary of {vocab_size}",
            mend="the tokenizer beside the model is another model's: put the right one there",
        )
    return found


def require_text(
    paths: Sequence[Path], *, vocab_size: int, samples: int, seqlen: int, corpus: Corpus | None = None
) -> None:
    """Check what can be of calibration text before the tokenizer is there and any text is read.

    Args:
        paths, vocab_size, samples, seqlen, corpus: see `load_calibration`; `samples` with those that are `more`.

    Raises:
        ShearingError: no such text, no corpus of this vocabulary, or one of too little text.
    """
    if len(paths) == 1 and paths[0].is_dir():
        _rows_of(corpus or _opened(paths[0], vocab_size=vocab_size), samples=samples, seqlen=seqlen)
        return
    try:
        for path in paths:
            path.open("rb").close()
    except OSError as error:
        raise _unreadable(path, error=error) from error


def first_samples(mixture: Mixture, *, samples: int, micro_batch_size: int, device: torch.device) -> Iterator[Inputs]:
    """Inputs [B, S] of the first samples of a mixture, in its order.

    Args:
        samples: number of sequences.
        micro_batch_size: sequences per batch (B).
        device: where they are wanted.
    """
    for first in range(0, samples, micro_batch_size):
        batch = mixture.batch(first_sample=first, num_sequences=min(micro_batch_size, samples - first))
        documents = mixture.documents.documents(batch.positions, device=device, counted_BT=batch.counted)
        yield Inputs(batch.tokens[:, :-1].to(device), documents)


def _opened(path: Path, *, vocab_size: int, tokenizer: Any = None, bos: BosChoice = "auto") -> Corpus:
    if not (path / INDEX_NAME).is_file():
        raise ShearingError(
            "calibration",
            value=str(path),
            allowed="the folder of a prepared corpus, or files of text",
            mend=f"give the folder that holds {INDEX_NAME}, or the files themselves",
        )
    fingerprint = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
    with named({"corpus": "calibration"}):
        corpus = Corpus.open(path, vocab_size=vocab_size, tokenizer_fingerprint=fingerprint)
    if tokenizer is not None:
        begin = begin_tokens(tokenizer)
        require_bos(corpus.bos, choice=bos, front=begin.front, named=begin.named, corpus=str(path))
    return corpus


def _of_corpus(
    corpus: Corpus, *, samples: int, seqlen: int, seed: int, rules: DocumentRules, source: str
) -> Calibration:
    rows = _rows_of(corpus, samples=samples, seqlen=seqlen)
    long_enough = [name for name, count in rows.items() if count > 0]
    weights = {name: float(rows[name]) for name in long_enough}
    chosen = corpus.only(long_enough)
    mixture = Mixture(chosen, seed=seed, sequence_length=seqlen, weights=weights, documents=rules)
    [whole] = first_samples(mixture, samples=samples, micro_batch_size=samples, device=torch.device("cpu"))
    positions = counted = None
    if whole.documents is not None:
        positions, left_out = whole.documents.position_ids, whole.documents.left_out
        if left_out is not None and (rules.needs_positions or not chosen.all_count):
            counted = pad(~left_out[:, :-1], (1, 0), value=True)  # the first token of a row is no label
    return Calibration(whole.tokens.contiguous(), source, positions, counted)


def _rows_of(corpus: Corpus, *, samples: int, seqlen: int) -> dict[str, int]:
    """Rows of each domain's training text, which have to be `samples` in all."""
    lengths = {name: manifest.train.tokens for name, manifest in corpus.manifests.items()}
    rows = {name: (tokens - 1 + corpus.bos.in_row) // seqlen for name, tokens in lengths.items()}
    _require_enough(sum(rows.values()), samples=samples, seqlen=seqlen, where=str(corpus.path))
    return rows


class _Stream:
    """Documents end to end, cut into rows of a length."""

    def __init__(self, length: int) -> None:
        self.ids = array("q")
        self._length, self._begins = length, list[int]()

    @property
    def count(self) -> int:
        """How many whole rows there are."""
        return len(self.ids) // self._length

    def add(self, *parts: Sequence[int]) -> None:
        """A document."""
        self._begins.append(len(self.ids))
        for part in parts:
            self.ids.extend(part)

    def rows(self) -> Tensor:
        """All of them, int64 [count, length]."""
        return self._cut(np.asarray(self.ids, dtype=np.int64))

    def positions(self) -> Tensor:
        """Of their tokens, as `Corpus.row_positions` of rows without a token in front."""
        places = np.arange(len(self.ids))
        begins = np.zeros_like(places)
        for at in (self._begins, range(0, len(places), self._length)):
            inside = [begin for begin in at if begin < len(places)]
            begins[inside] = inside
        return self._cut(places - np.maximum.accumulate(begins))

    def _cut(self, values: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values[: self.count * self._length]).view(self.count, self._length)


def _documents_of(
    paths: Sequence[Path], *, tokenizer: Any, bos: Bos, samples: int, more: int, seqlen: int, text_field: str
) -> tuple[_Stream, _Stream]:
    """What `samples` rows are drawn from, and further documents where that has not `more` rows besides."""
    plain, end = PlainTokenizer.of(tokenizer), tokenizer.eos_token_id
    front = [cast("int", bos.token)] if bos.mode == "document" else []
    behind = [] if end is None else [end]
    stream, further = _Stream(seqlen - bos.in_row), _Stream(seqlen - bos.in_row)
    for path in paths:
        kind, compression = kind_of(str(path)) or ("text", None)
        needed = packages_of(kind, compression=compression)
        require_extra("data", modules=needed, what="calibration")
        source = TextFile(str(path), kind, text_field, compression)
        try:
            for document in read_local_texts(source, bad=BadInput("stop", MAX_DOCUMENT_BYTES)):
                is_full = kind != "text" and len(stream.ids) >= READ_TIMES * samples * seqlen
                if is_full and stream.count + further.count >= samples + more:
                    break
                (further if is_full else stream).add(front, plain.encode([document.text])[0].ids, behind)
        except OSError as error:
            raise _unreadable(path, error=error) from error
    return stream, further


def _drawn(
    stream: _Stream, further: _Stream, *, samples: int, seed: int, bos: Bos, rules: DocumentRules, source: str
) -> Calibration:
    """Rows in an order that the stream and the seed alone say, and behind all of them those further on."""
    drawn = torch.randperm(stream.count, generator=torch.Generator().manual_seed(seed))[:samples]

    def chosen(of_stream: Tensor, of_further: Tensor) -> Tensor:
        return torch.cat([of_stream[drawn], of_further[: samples - len(drawn)]])

    tokens = chosen(stream.rows(), further.rows())
    positions = chosen(stream.positions(), further.positions()) if rules.needs_positions else None
    if bos.in_row:
        tokens = pad(tokens, (1, 0), value=cast("int", bos.token))
        if positions is not None:
            # It is of the document that the row begins with.
            positions = pad(positions + (positions == torch.arange(positions.shape[1])), (1, 0))
    counted = None if positions is None or rules.heeding(bos).loss_across else positions != 0
    return Calibration(tokens, source, positions if rules.attention_within else None, counted)


def _unreadable(path: Path, *, error: OSError) -> ShearingError:
    return ShearingError(
        "calibration",
        value=str(path),
        allowed="the folder of a prepared corpus, or files of text",
        mend=error.strerror or "check the path",
    )


def _require_enough(rows: int, *, samples: int, seqlen: int, where: str) -> None:
    if rows < samples:
        raise ShearingError(
            "samples",
            value=samples,
            allowed=f"at most {rows}, as {where} has {rows} rows of {seqlen} tokens",
            mend="give more text, or lower samples or seqlen",
        )
