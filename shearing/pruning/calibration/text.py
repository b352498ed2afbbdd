"""Calibration text: the first samples of a mixture, or rows of plain text files drawn by a seed.

Legend: B sequences, S tokens each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from shearing.data.corpus.bos import Bos, BosChoice, require_bos, resolve_bos
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import INDEX_NAME, tokenizer_fingerprint
from shearing.data.documents import Inputs
from shearing.data.mixture.sampler import Mixture
from shearing.errors import ShearingError, named
from shearing.models.tokenizer import begin_tokens


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
    corpus: Corpus | None = None,
    bos: BosChoice = "auto",
) -> Calibration:
    """Rows of the training split of a corpus, domains by their share of the tokens; or of text files.

    Args:
        paths: the folder of one corpus, or text files (UTF-8), of which each ends in the tokenizer's end of text.
        tokenizer: the model's.
        vocab_size: rows of the model's embedding.
        samples: number of rows.
        seqlen: tokens of a row.
        seed: of the draw; no row is drawn twice.
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
        tokens = _of_files(paths, tokenizer=tokenizer, bos=begun, samples=samples, seqlen=seqlen, seed=seed)
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
        yield Inputs(batch.tokens[:, :-1].to(device), mixture.documents.documents(batch.positions, device=device))


def _opened(path: Path, *, tokenizer: Any, vocab_size: int, bos: BosChoice) -> Corpus:
    if not (path / INDEX_NAME).is_file():
        raise ShearingError(
            "calibration",
            value=str(path),
            allowed="the folder of a prepared corpus, or plain text files",
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


def _of_files(paths: Sequence[Path], *, tokenizer: Any, bos: Bos, samples: int, seqlen: int, seed: int) -> Tensor:
    ids: list[int] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ShearingError(
                "calibration",
                value=str(path),
                allowed="the folder of a prepared corpus, or plain text files in UTF-8",
                mend=error.strerror or "check the path" if isinstance(error, OSError) else "convert the file to UTF-8",
            ) from error
        if bos.mode == "document":
            ids.append(cast("int", bos.token))
        ids += tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    length = seqlen - bos.in_row
    rows = len(ids) // length
    _require_enough(rows, samples=samples, seqlen=seqlen, where=", ".join(map(str, paths)))
    drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:samples]
    chosen = torch.tensor(ids[: rows * length], dtype=torch.int64).view(rows, length)[drawn]
    return chosen if not bos.in_row else torch.cat([torch.full((samples, 1), cast("int", bos.token)), chosen], dim=1)


def _require_enough(rows: int, *, samples: int, seqlen: int, where: str) -> None:
    if rows < samples:
        raise ShearingError(
            "samples",
            value=samples,
            allowed=f"at most {rows}, as {where} has {rows} rows of {seqlen} tokens",
            mend="give more text, or lower samples or seqlen",
        )
