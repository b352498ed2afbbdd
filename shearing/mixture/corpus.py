"""A corpus on disk: one folder per domain, flat tokens with document ends, so rows of any length can be cut later.

    CORPUS/corpus.json             written last: a folder without it is an interrupted preparation
    CORPUS/DOMAIN/manifest.json    documents, tokens, bytes of text of each split; dtype, tokenizer, sources
    CORPUS/DOMAIN/train.bin        tokens one after the other, each document closed by the separator
    CORPUS/DOMAIN/train_ends.npy   int64, where each document ends in train.bin (separator included)
    CORPUS/DOMAIN/heldout.bin, heldout_ends.npy

Row i at sequence length S holds tokens [i*S, i*S + S + 1): S inputs, and as last label the first input of row i + 1.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Self

from shearing.errors import ShearingError
from shearing.run_directory import flush_folder, write_json

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")
FORMAT = 1
INDEX_NAME = "corpus.json"
MANIFEST_NAME = "manifest.json"
DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

# Texts on which tokenizers that share a vocabulary still differ: digits, runs of spaces, case, accents, symbols.
PROBES = (
    "In 1887, 12345 people paid $3.50 each; it's 100% true.",
    "def area(r):\n    return 3.14159 * r ** 2  # \t tabs\n\n",
    "Être naïve à Zürich, 東京 or Москва? 🙂 <|endoftext|>",
)


class Tokenizer(Protocol):
    """What a fingerprint needs; both `transformers` and `tokenizers` objects have it."""

    def get_vocab(self) -> dict[str, int]: ...

    def encode(self, text: str, /, *, add_special_tokens: bool) -> Any: ...


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of the vocabulary and of how the tokenizer splits a few probes (hexadecimal, 32 digits).

    It does not depend on how a library version writes its files, and it does notice another pre-tokeniser.
    """
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode(errors="surrogatepass"))
    for probe in PROBES:
        encoded = tokenizer.encode(probe, add_special_tokens=False)
        digest.update(json.dumps([int(i) for i in getattr(encoded, "ids", encoded)]).encode())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class SplitManifest:
    """Counts of one split of one domain; `bytes` is UTF-8 text without separators, `sha256` is of its tokens."""

    documents: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DomainManifest:
    """What a domain folder says about itself; `inputs` identifies what it was prepared from, and how."""

    domain: str
    train: SplitManifest
    heldout: SplitManifest
    dtype: str
    vocab_size: int
    largest_token: int
    separator_id: int
    tokenizer: str
    tokenizer_fingerprint: str
    sources: tuple[str, ...]
    inputs: str

    @classmethod
    def read(cls, folder: Path) -> DomainManifest:
        """Read `folder/manifest.json`.

        Raises:
            ShearingError: it is missing or unreadable.
        """
        path = folder / MANIFEST_NAME
        try:
            values = json.loads(path.read_text())
            for split in SPLITS:
                values[split] = SplitManifest(**values[split])
            return cls(**{**values, "sources": tuple(values["sources"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ShearingError(
                str(path),
                value=str(error),
                allowed="the manifest of a prepared domain",
                mend="prepare the domain again",
            ) from error

    def split(self, split: Split) -> SplitManifest:
        return self.train if split == "train" else self.heldout


class Corpus:
    """Tokenised domains, memory-mapped; safe to open in any number of processes. Use `Corpus.open`."""

    def __init__(self, path: Path, *, manifests: Mapping[str, DomainManifest]) -> None:
        self.path = path
        self.manifests = dict(manifests)
        self._tokens: dict[tuple[str, Split], npt.NDArray[np.uint16] | npt.NDArray[np.uint32]] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        domains: Iterable[str] | None = None,
        vocab_size: int | None = None,
        tokenizer_fingerprint: str | None = None,
        sequence_length: int | None = None,
    ) -> Corpus:
        """Open a prepared corpus; each optional argument adds a check.

        Args:
            path: folder written by `CorpusWriter`.
            domains: domains to use, in this order; all of them, in the corpus' order, if None.
            vocab_size: rows of the model's embedding; every token id must be below it.
            tokenizer_fingerprint: of the tokenizer that goes with the model.
            sequence_length: each split of each domain must hold at least one row of it.

        Raises:
            ShearingError: the corpus or a domain is missing, interrupted, empty, damaged or too short, or its
                tokens are another tokenizer's.
        """
        path = Path(path)
        index = _read_index(path)
        available: list[str] = index["domains"]
        names = available if domains is None else list(domains)
        if not names:
            raise ShearingError(
                "data.domains", value=names, allowed=f"at least one of {', '.join(available)}", mend="name a domain"
            )
        manifests = {}
        for name in names:
            if name not in available:
                raise ShearingError(
                    "data.domains",
                    value=name,
                    allowed=", ".join(available),
                    mend=nearest_name(name, available) or f"prepare the domain {name} into {path}",
                )
            manifests[name] = DomainManifest.read(path / name)
        corpus = cls(path, manifests=manifests)
        for name in names:
            corpus._check(name, vocab_size=vocab_size, tokenizer_fingerprint=tokenizer_fingerprint)
        if sequence_length is not None:
            for name in names:
                for split in SPLITS:
                    corpus._checked_rows(name, sequence_length=sequence_length, split=split)
        return corpus

    @property
    def domains(self) -> list[str]:
        return list(self.manifests)

    @property
    def fingerprint(self) -> str:
        """Hash of the opened domains' names and tokens, wherever the corpus lies (hexadecimal, 32 digits)."""
        content = [[m.domain, m.dtype, m.train.sha256, m.heldout.sha256] for m in self.manifests.values()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def train_rows(self, domain: str, *, sequence_length: int) -> int:
        """Rows of `sequence_length` inputs in the training split.

        Raises:
            ShearingError: there is not even one.
        """
        return self._checked_rows(domain, sequence_length=sequence_length, split="train")

    def heldout_rows(self, domain: str, *, sequence_length: int) -> int:
        """Rows of `sequence_length` inputs in the held-out split.

        Raises:
            ShearingError: there is not even one.
        """
        return self._checked_rows(domain, sequence_length=sequence_length, split="heldout")

    def row(self, domain: str, index: int, *, sequence_length: int, split: Split = "train") -> npt.NDArray[np.int64]:
        """Tokens of one row, int64 [S + 1]: inputs are [:-1], labels [1:]."""
        start = index * sequence_length
        tokens = self._map(domain, split)[start : start + sequence_length + 1]
        if index < 0 or len(tokens) != sequence_length + 1:
            raise IndexError(f"row {index} of {domain}/{split} at sequence length {sequence_length}")
        return tokens.astype(np.int64)

    def document_ends(self, domain: str, *, split: Split = "train") -> npt.NDArray[np.int64]:
        """Where each document ends in the split's tokens, its separator included; int64 [documents]."""
        ends: npt.NDArray[np.int64] = np.load(self.path / domain / f"{split}_ends.npy", mmap_mode="r")
        return ends

    def heldout_batches(
        self, domain: str, *, sequence_length: int, tokens: int, micro_batch_size: int
    ) -> Iterator[Tensor]:
        """A fixed subset of held-out rows, spread evenly over the split, in order.

        Args:
            tokens: how many tokens to read at most; at least one row, never more than there are.
            micro_batch_size: rows per batch; the last batch may have fewer.

        Yields:
            int64 [B, S + 1].
        """
        rows = self.heldout_rows(domain, sequence_length=sequence_length)
        count = max(1, min(rows, tokens // sequence_length))
        indices = [i * rows // count for i in range(count)]
        for start in range(0, count, micro_batch_size):
            chosen = indices[start : start + micro_batch_size]
            batch = [self.row(domain, i, sequence_length=sequence_length, split="heldout") for i in chosen]
            yield torch.from_numpy(np.stack(batch))

    def _map(self, domain: str, split: Split) -> npt.NDArray[np.uint16] | npt.NDArray[np.uint32]:
        key = (domain, split)
        if key not in self._tokens:
            dtype = np.dtype(self.manifests[domain].dtype)
            self._tokens[key] = np.memmap(self.path / domain / f"{split}.bin", dtype=dtype, mode="r")
        return self._tokens[key]

    def _checked_rows(self, domain: str, *, sequence_length: int, split: Split) -> int:
        tokens = self.manifests[domain].split(split).tokens
        rows = (tokens - 1) // sequence_length
        if rows < 1:
            raise ShearingError(
                "data.sequence_length",
                value=sequence_length,
                allowed=f"at most {tokens - 1}, as domain {domain} has {tokens} tokens of {split} text",
                mend=f"choose a shorter sequence, prepare more text for {domain}, or leave it out of data.domains",
            )
        return rows

    def _check(self, domain: str, *, vocab_size: int | None, tokenizer_fingerprint: str | None) -> None:
        manifest = self.manifests[domain]
        for split in SPLITS:
            counts = manifest.split(split)
            if counts.tokens == 0:
                raise ShearingError(
                    f"{self.path / domain}",
                    value=f"0 tokens in {split}",
                    allowed="a domain with text in both splits",
                    mend=f"prepare the domain {domain} again from more text, or leave it out of data.domains",
                )
            file = self.path / domain / f"{split}.bin"
            expected = counts.tokens * np.dtype(manifest.dtype).itemsize
            found = file.stat().st_size if file.is_file() else None
            if found != expected:
                raise ShearingError(
                    str(file),
                    value="missing" if found is None else f"{found} bytes",
                    allowed=f"{expected} bytes, as the manifest says",
                    mend="the file is damaged: prepare the domain again",
                )
        if vocab_size is not None and manifest.largest_token >= vocab_size:
            raise ShearingError(
                "data.corpus",
                value=f"{self.path} (domain {domain} has token id {manifest.largest_token})",
                allowed=f"token ids below the model's vocabulary of {vocab_size}",
                mend="prepare the text again with the tokenizer of this model",
            )
        if tokenizer_fingerprint is not None and manifest.tokenizer_fingerprint != tokenizer_fingerprint:
            raise ShearingError(
                "data.corpus",
                value=f"{self.path} (domain {domain} was tokenised with {manifest.tokenizer}, "
                f"fingerprint {manifest.tokenizer_fingerprint})",
                allowed=f"tokens of the model's own tokenizer, fingerprint {tokenizer_fingerprint}",
                mend="prepare the text again with the tokenizer of this model",
            )


class CorpusWriter:
    """Writes a corpus domain by domain; each appears whole or not at all, and `finish` makes the corpus valid.

    Args:
        path: folder of the corpus, made if missing; may hold domains written earlier.
        vocab_size: largest token id + 1; chooses uint16 or uint32.
        separator_id: token put after every document.
        tokenizer: name of the tokenizer, for people.
        tokenizer_fingerprint: of the same tokenizer, for machines.
        heldout_fraction: share of documents held out, in (0, 1).

    Raises:
        ShearingError: the folder cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocab_size: int,
        separator_id: int,
        tokenizer: str,
        tokenizer_fingerprint: str,
        heldout_fraction: float = 0.05,
    ) -> None:
        if not 0.0 < heldout_fraction < 1.0:
            raise ShearingError(
                "heldout_fraction", value=heldout_fraction, allowed="between 0 and 1, both excluded", mend="try 0.05"
            )
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.separator_id = separator_id
        self.tokenizer = tokenizer
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.heldout_fraction = heldout_fraction
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for left in self.path.glob(".partial-*"):
                shutil.rmtree(left)
        except OSError as error:
            raise ShearingError(
                str(self.path), value=str(error), allowed="a folder that can be written", mend="choose another output"
            ) from error

    def is_complete(self, domain: str, *, inputs: str) -> bool:
        """Whether the domain was already written from the same `inputs` with the same tokenizer and split.

        Raises:
            ShearingError: it was written from something else; runs may depend on it, so it is not replaced.
        """
        if not (self.path / domain / MANIFEST_NAME).exists():
            return False
        if DomainManifest.read(self.path / domain).inputs == self._inputs(inputs):
            return True
        raise ShearingError(
            str(self.path / domain),
            value="a domain that was prepared from other text or with other settings",
            allowed="the same text and settings, or a new folder",
            mend=f"choose another output, or delete {self.path / domain}",
        )

    def domain(self, name: str, *, sources: Sequence[str], inputs: str) -> DomainWriter:
        """A writer of one domain, to be used as a context manager; leaving it without an error publishes the domain.

        Args:
            sources: where the text came from, for people.
            inputs: identifies text and settings, for `is_complete`.

        Raises:
            ShearingError: the name cannot be a folder's, or is taken.
        """
        if not DOMAIN_NAME.fullmatch(name):
            raise ShearingError(
                "domain", value=name, allowed="letters, digits, _, - and .", mend="rename the domain, say my_text"
            )
        return DomainWriter(self, name=name, sources=sources, inputs=self._inputs(inputs))

    def finish(self) -> Corpus:
        """Write `corpus.json` over all domains in the folder and open the corpus.

        Raises:
            ShearingError: there is no domain, or one was written with another tokenizer.
        """
        names = sorted(folder.parent.name for folder in self.path.glob(f"*/{MANIFEST_NAME}"))
        if not names:
            raise ShearingError(str(self.path), value="no domain", allowed="at least one", mend="prepare a domain")
        index = {"format": FORMAT, "domains": names, "tokenizer_fingerprint": self.tokenizer_fingerprint}
        write_json(self.path / INDEX_NAME, index)
        return Corpus.open(self.path, tokenizer_fingerprint=self.tokenizer_fingerprint)

    def _inputs(self, inputs: str) -> str:
        settings = [inputs, self.tokenizer_fingerprint, self.separator_id, self.heldout_fraction, FORMAT]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


class DomainWriter:
    """Takes documents one by one and splits them by a hash of their text, so equal texts are never on both sides."""

    def __init__(self, corpus: CorpusWriter, *, name: str, sources: Sequence[str], inputs: str) -> None:
        self._corpus = corpus
        self._name = name
        self._sources = tuple(sources)
        self._inputs = inputs
        self._final = corpus.path / name
        self._folder = corpus.path / f".partial-{name}"
        self._largest_token = 0
        # Per split: the open file, and of each document its end, bytes of text and hash.
        self._files: dict[Split, BinaryIO] = {}
        self._documents: dict[Split, list[tuple[int, int, int]]] = {"train": [], "heldout": []}
        self.manifest: DomainManifest | None = None

    def __enter__(self) -> Self:
        if self._final.exists():
            raise ShearingError(
                str(self._final), value="exists", allowed="a new domain", mend="choose another output, or delete it"
            )
        self._folder.mkdir()
        self._files = {split: (self._folder / f"{split}.bin").open("wb") for split in SPLITS}
        return self

    @property
    def tokens(self) -> int:
        """Tokens written so far, both splits, separators included."""
        return sum(documents[-1][0] for documents in self._documents.values() if documents)

    def add(self, text: str, *, token_ids: Sequence[int]) -> None:
        """Append one document; the separator is added here.

        Raises:
            ShearingError: a token id is negative or not below the vocabulary size.
        """
        tokens = np.empty(len(token_ids) + 1, dtype=np.int64)
        tokens[:-1] = token_ids
        tokens[-1] = self._corpus.separator_id
        largest = int(tokens.max())
        if largest >= self._corpus.vocab_size or int(tokens.min()) < 0:
            raise ShearingError(
                f"token id in domain {self._name}",
                value=largest if largest >= self._corpus.vocab_size else int(tokens.min()),
                allowed=f"0 to {self._corpus.vocab_size - 1}",
                mend="use the tokenizer whose vocabulary size was given",
            )
        self._largest_token = max(self._largest_token, largest)
        encoded = text.encode(errors="surrogatepass")
        text_hash = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")
        split: Split = "heldout" if text_hash < self._corpus.heldout_fraction * 2.0**64 else "train"
        documents = self._documents[split]
        documents.append(((documents[-1][0] if documents else 0) + len(tokens), len(encoded), text_hash))
        self._files[split].write(tokens.astype(self._corpus.dtype).tobytes())

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is not None:
            for file in self._files.values():
                file.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for split in SPLITS:
            if not self._documents[split]:
                self._divide("train" if split == "heldout" else "heldout")
        splits = {split: self._close_split(split) for split in SPLITS}
        self.manifest = DomainManifest(
            domain=self._name,
            train=splits["train"],
            heldout=splits["heldout"],
            dtype=self._corpus.dtype.name,
            vocab_size=self._corpus.vocab_size,
            largest_token=self._largest_token,
            separator_id=self._corpus.separator_id,
            tokenizer=self._corpus.tokenizer,
            tokenizer_fingerprint=self._corpus.tokenizer_fingerprint,
            sources=self._sources,
            inputs=self._inputs,
        )
        write_json(self._folder / MANIFEST_NAME, asdict(self.manifest))
        self._folder.rename(self._final)
        flush_folder(self._corpus.path)

    def _divide(self, full: Split) -> None:
        """Few documents may all hash to one side: the lowest hash (with its duplicates) then is what is held out."""
        documents = self._documents[full]
        hashes = {text_hash for _, _, text_hash in documents}
        if len(hashes) < 2:
            shutil.rmtree(self._folder)
            raise ShearingError(
                f"domain {self._name}",
                value=f"{len(hashes)} distinct documents",
                allowed="at least two, as held-out text is split off by document",
                mend="give more files, or say how one file divides into documents",
            )
        chosen = min(hashes)
        tokens = np.fromfile(self._folder / f"{full}.bin", dtype=self._corpus.dtype)
        kept: dict[Split, list[npt.NDArray[Any]]] = {"train": [], "heldout": []}
        self._documents = {"train": [], "heldout": []}
        start = 0
        for end, num_bytes, text_hash in documents:
            split: Split = "heldout" if text_hash == chosen else "train"
            kept[split].append(tokens[start:end])
            before = self._documents[split][-1][0] if self._documents[split] else 0
            self._documents[split].append((before + end - start, num_bytes, text_hash))
            start = end
        for split in SPLITS:
            np.concatenate(kept[split]).tofile(self._folder / f"{split}.bin")

    def _close_split(self, split: Split) -> SplitManifest:
        documents = self._documents[split]
        with (self._folder / f"{split}_ends.npy").open("wb") as file:
            np.save(file, np.array([end for end, _, _ in documents], dtype=np.int64))
            file.flush()
            os.fsync(file.fileno())
        with (self._folder / f"{split}.bin").open("rb") as file:
            sha256 = _sha256(file)
        return SplitManifest(
            documents=len(documents),
            tokens=documents[-1][0] if documents else 0,
            bytes=sum(num_bytes for _, num_bytes, _ in documents),
            sha256=sha256,
        )


def nearest_name(name: str, names: Iterable[str]) -> str:
    """'did you mean X?' for the nearest of `names`, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {near[0]}?" if near else ""


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _read_index(path: Path) -> dict[str, Any]:
    prepare = "python -m data_tools.prepare, or python -m data_tools.demo for the demo's text"
    if not path.is_dir():
        raise ShearingError("data.corpus", value=str(path), allowed="a prepared corpus", mend=f"prepare it: {prepare}")
    try:
        index: dict[str, Any] = json.loads((path / INDEX_NAME).read_text())
    except FileNotFoundError as error:
        raise ShearingError(
            "data.corpus",
            value=f"{path} without {INDEX_NAME}",
            allowed="a corpus whose preparation was finished",
            mend=f"run the preparation again, it continues where it was: {prepare}",
        ) from error
    except (OSError, ValueError) as error:
        raise ShearingError(
            str(path / INDEX_NAME), value=str(error), allowed="the index of a corpus", mend=f"prepare again: {prepare}"
        ) from error
    if index.get("format") != FORMAT:
        raise ShearingError(
            str(path / INDEX_NAME),
            value=f"format {index.get('format')}",
            allowed=f"format {FORMAT}",
            mend=f"prepare the text again: {prepare}",
        )
    return index
