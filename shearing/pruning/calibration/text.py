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
import torch
from torch import Tensor

from shearing.data.corpus.bos import Bos, BosChoice, require_bos, resolve_bos
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import INDEX_NAME, tokenizer_fingerprint
from shearing.data.documents import Inputs
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
    """What the statistics are taken on.

    Attributes:
        tokens: int64 [samples, seqlen].
        source: where the text came from, for people.
    """

    tokens: Tensor
    source: str

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens and how they are cut (hexadecimal, 32 digits)."""
        content = str(tuple(self.tokens.shape)).encode() + self.tokens.contiguous().numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:32]


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

    Raises:
        ShearingError: no such text, tokens of another tokenizer, texts that begin otherwise, or too little of it.
    """
    if len(paths) == 1 and paths[0].is_dir():
        corpus = corpus or _opened(paths[0], tokenizer=tokenizer, vocab_size=vocab_size, bos=bos)
        tokens = _of_corpus(corpus, samples=samples, seqlen=seqlen, seed=seed)
    else:
        begin = begin_tokens(tokenizer)
        begun = resolve_bos(bos, front=begin.front, named=begin.named)
        tokens = _of_files(
            paths, tokenizer=tokenizer, bos=begun, samples=samples, seqlen=seqlen, seed=seed, text_field=text_field
        )
        if int(tokens.max()) >= vocab_size:
            raise ShearingError(
                "calibration",
                value=f"token id {int(tokens.max())}",
                allowed=f"token ids below the model's vocabulary of {vocab_size}",
                mend="the tokenizer beside the model is another model's: put the right one there",
            )
    return Calibration(tokens, ", ".join(map(str, paths)))


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


def _opened(path: Path, *, tokenizer: Any, vocab_size: int, bos: BosChoice) -> Corpus:
    if not (path / INDEX_NAME).is_file():
        raise ShearingError(
            "calibration",
            value=str(path),
            allowed="the folder of a prepared corpus, or files of text",
            mend=f"give the folder that holds {INDEX_NAME}, or the files themselves",
        )
    with named({"corpus": "calibration"}):
        corpus = Corpus.open(path, vocab_size=vocab_size, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    begin = begin_tokens(tokenizer)
    require_bos(corpus.bos, choice=bos, front=begin.front, named=begin.named, corpus=str(path))
    return corpus


def _of_corpus(corpus: Corpus, *, samples: int, seqlen: int, seed: int) -> Tensor:
    lengths = {name: manifest.train.tokens for name, manifest in corpus.manifests.items()}
    rows = {name: (tokens - 1 + corpus.bos.in_row) // seqlen for name, tokens in lengths.items()}
    long_enough = [name for name, count in rows.items() if count > 0]
    _require_enough(sum(rows.values()), samples=samples, seqlen=seqlen, where=str(corpus.path))
    weights = {name: float(rows[name]) for name in long_enough}
    mixture = Mixture(corpus.only(long_enough), seed=seed, sequence_length=seqlen, weights=weights)
    [whole] = first_samples(mixture, samples=samples, micro_batch_size=samples, device=torch.device("cpu"))
    return whole.tokens.contiguous()


def _of_files(
    paths: Sequence[Path], *, tokenizer: Any, bos: Bos, samples: int, seqlen: int, seed: int, text_field: str
) -> Tensor:
    plain, end = PlainTokenizer.of(tokenizer), tokenizer.eos_token_id
    ids = array("q")
    for path in paths:
        kind, compression = kind_of(str(path)) or ("text", None)
        needed = packages_of(kind, compression=compression)
        require_extra("data", modules=needed, what="calibration")
        source = TextFile(str(path), kind, text_field, compression)
        try:
            for document in read_local_texts(source, bad=BadInput("stop", MAX_DOCUMENT_BYTES)):
                if kind != "text" and len(ids) >= READ_TIMES * samples * seqlen:
                    break
                if bos.mode == "document":
                    ids.append(cast("int", bos.token))
                ids.extend(plain.encode([document.text])[0].ids)
                if end is not None:
                    ids.append(end)
        except OSError as error:
            raise ShearingError(
                "calibration",
                value=str(path),
                allowed="the folder of a prepared corpus, or files of text",
                mend=error.strerror or "check the path",
            ) from error
    length = seqlen - bos.in_row
    rows = len(ids) // length
    _require_enough(rows, samples=samples, seqlen=seqlen, where=", ".join(map(str, paths)))
    drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:samples]
    chosen = torch.from_numpy(np.frombuffer(ids, dtype=np.int64)[: rows * length]).view(rows, length)[drawn]
    return chosen if not bos.in_row else torch.cat([torch.full((samples, 1), cast("int", bos.token)), chosen], dim=1)


def _require_enough(rows: int, *, samples: int, seqlen: int, where: str) -> None:
    if rows < samples:
        raise ShearingError(
            "samples",
            value=samples,
            allowed=f"at most {rows}, as {where} has {rows} rows of {seqlen} tokens",
            mend="give more text, or lower samples or seqlen",
        )
