"""The folders of a corpus as they are made: a domain from shards whose documents have been given a side, the index."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from shearing.data.corpus.bos import Bos
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.counted import BitsWriter, counted_path
from shearing.data.corpus.format import (
    FORMAT,
    INDEX_NAME,
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_NAME,
    DomainManifest,
    Split,
    SplitManifest,
)
from shearing.data.corpus.shards import Shard, token_dtype
from shearing.data.corpus.splits import Documents, Earlier, SplitSizes, choose_splits, first_of_each
from shearing.data.corpus.stored_split import StoredSplit
from shearing.errors import ShearingError
from shearing.files.checksums import sha256_of_file
from shearing.files.durable import read_json, write_json, write_text

# Enough to write at the disk's speed, little beside what else is in memory.
TOKENS_PER_WRITE = 1 << 22


class Place(IntEnum):
    """Where a document of a shard goes: into a split, in the order of `SPLITS`, or nowhere."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2
    DUPLICATE = 3
    NEAR_DUPLICATE = 4


Places = npt.NDArray[np.uint8]
_DIVIDED = "divided"
"""In the index, for each domain: of which inputs it is, and a digest of its splits. Indices of earlier versions have
none."""
LEFT_OUT = {Place.DUPLICATE: "duplicate", Place.NEAR_DUPLICATE: "near_duplicate"}


@dataclass(frozen=True)
class DomainSettings:
    """What a domain's manifest says beside what is counted; see `DomainManifest`."""

    vocab_size: int
    separator_id: int
    tokenizer: str
    tokenizer_fingerprint: str
    split_seed: int
    sizes: SplitSizes
    versions: Mapping[str, str]
    bos: Bos = field(default_factory=Bos)

    @property
    def begin_id(self) -> int | None:
        """Token that lies in front of each document."""
        return self.bos.token if self.bos.mode == "document" else None


def make_corpus_folder(path: Path) -> None:
    """Make the folder of a corpus.

    Raises:
        ShearingError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShearingError(
            "output",
            value=str(path),
            allowed=f"a folder that can be written, there or not ({error.strerror or error})",
            mend="choose another output",
        ) from error


def is_complete(folder: Path, *, inputs: str) -> bool:
    """Whether the domain in `folder` was already written from the same `inputs`.

    Raises:
        ShearingError: it was written from something else; runs may depend on it, so it is not replaced.
    """
    if not (folder / MANIFEST_NAME).exists():
        return False
    if DomainManifest.read(folder).inputs == inputs:
        return True
    raise ShearingError(
        str(folder),
        value="a domain that was prepared from other text or with other settings",
        allowed="the same text and settings, or a new folder",
        mend=f"choose another output, or delete {folder}",
    )


def domains_of(path: Path) -> list[str]:
    """Names of the domains that are whole in a corpus folder, finished or not."""
    return sorted(folder.parent.name for folder in path.glob(f"*/{MANIFEST_NAME}") if folder.parent.name[0] != ".")


def earlier_texts(path: Path, *, besides: Iterable[str] = ()) -> Earlier:
    """Hashes of all texts in the domains of a corpus folder, by split; `besides` names domains to leave out."""
    hashes: dict[Split, list[npt.NDArray[np.uint64]]] = {split: [] for split in SPLITS}
    for name in set(domains_of(path)) - set(besides):
        manifest = DomainManifest.read(path / name)
        for split in SPLITS:
            hashes[split].append(StoredSplit.find(path / name, split=split, manifest=manifest).hashes())
    empty = np.empty(0, np.uint64)
    return Earlier(**{split: np.unique(np.concatenate([empty, *found])) for split, found in hashes.items()})


def decide_places(
    domains: Mapping[str, Documents],
    *,
    sizes: SplitSizes,
    seed: int,
    earlier: Earlier | None = None,
    remove_duplicates: bool = False,
    remove_near_duplicates: bool = False,
) -> dict[str, Places]:
    """Where each document of each domain goes; uint8 [documents] of `Place`.

    Args:
        sizes, seed, earlier: see `splits.choose_splits`.
        remove_duplicates: of equal texts in a domain only the first stays.
        remove_near_duplicates: of each cluster, over all domains, only the first document stays.

    Raises:
        ShearingError: a domain cannot have text in each split.
    """
    places = {name: np.zeros(len(each.hashes), dtype=np.uint8) for name, each in domains.items()}
    if remove_near_duplicates:
        _place_near_duplicates(domains, places=places)
    kept = {}
    for name, each in domains.items():
        if remove_duplicates:
            # Of what is in no cluster already gone: texts too short for near-duplicates to be looked for.
            places[name][(places[name] == Place.TRAIN) & ~first_of_each(each.hashes)] = Place.DUPLICATE
        stays = places[name] == Place.TRAIN
        if stays.all():
            kept[name] = each
            continue
        clusters = None if each.clusters is None else each.clusters[stays]
        kept[name] = Documents(hashes=each.hashes[stays], tokens=each.tokens[stays], clusters=clusters)
    for name, sides in choose_splits(kept, sizes=sizes, seed=seed, earlier=earlier).items():
        places[name][places[name] == Place.TRAIN] = sides
    return places


def require_divided_as_before(
    path: Path, *, domains: Mapping[str, Documents], places: Mapping[str, Places], inputs: Mapping[str, str]
) -> None:
    """Check that domains which the index names are divided as they were, where they are made again.

    What was a text to judge by would else be trained on by whoever goes on with the corpus.

    Args:
        path: folder of the corpus.
        domains: the documents of each domain that is made.
        places: where they go.
        inputs: as for their manifests; a domain of others is another one.

    Raises:
        ShearingError: one is divided otherwise.
    """
    try:
        before = read_json(path / INDEX_NAME).get(_DIVIDED, {})
    except (OSError, ValueError):  # none yet, or a damaged one, which is written anew
        return
    for name, each in domains.items():
        if name not in before or before[name]["inputs"] != inputs[name]:
            continue
        checksums = (_array_sha256(each.hashes[places[name] == Place[split.upper()]]) for split in SPLITS)
        if before[name]["splits"] != _digest(checksums):
            raise ShearingError(
                str(path / name),
                value="made again, but divided otherwise than it was",
                allowed=f"the splits that {INDEX_NAME} tells of, as runs may depend on them; near-duplicates in "
                "domains that are kept are not found again",
                mend="prepare all domains together into a new folder",
            )


def _place_near_duplicates(domains: Mapping[str, Documents], *, places: Mapping[str, Places]) -> None:
    clusters = [each.clusters for each in domains.values() if each.clusters is not None]
    every = np.concatenate([np.empty(0, np.int64), *clusters])
    gone = (every >= 0) & ~first_of_each(every)
    starts = np.cumsum([0, *(len(each) for each in clusters)])
    for name, start, end in zip(domains, starts[:-1], starts[1:], strict=True):
        places[name][gone[start:end]] = Place.NEAR_DUPLICATE


def write_domain_folder(
    folder: Path,
    *,
    name: str,
    shards: Sequence[Shard],
    places: Places,
    settings: DomainSettings,
    inputs: str,
    left_out: Mapping[str, int] | None = None,
) -> DomainManifest:
    """Write a domain's files and manifest into an existing folder, flushed to disk.

    Args:
        shards: in the order in which their documents are to lie on disk.
        places: of the documents of all shards, in the same order; uint8 [documents] of `Place`.
        inputs: for the manifest.
        left_out: documents that no shard knows of, by reason.
    """
    sides = {split: Place[split.upper()] for split in SPLITS}
    counted = any(shard.counted for shard in shards)
    writers = {
        split: _SplitWriter(folder, split=split, documents=int((places == sides[split]).sum()), counted=counted)
        for split in SPLITS
    }
    counts = Counter(left_out or {})
    dtype = token_dtype(settings.vocab_size)
    first = 0
    for shard in shards:
        counts.update(shard.left_out)
        first_token = 0
        for documents in shard.read_documents():
            chosen = places[first : first + len(documents)]
            first += len(documents)
            for begin, end, start, stop in _pieces(documents["tokens"]):
                side = np.repeat(chosen[begin:end], documents["tokens"][begin:end])
                piece = shard.read_tokens(first_token + start, first_token + stop, dtype=dtype)
                for split, writer in writers.items():
                    writer.write(piece[side == sides[split]])
                if counted:
                    bits = shard.read_counted(first_token + start, first_token + stop)
                    for split, writer in writers.items():
                        writer.count(bits[side == sides[split]])
            first_token += int(documents["tokens"].sum())
            for split, writer in writers.items():
                writer.describe(documents[chosen == sides[split]])
    for place, reason in LEFT_OUT.items():
        if gone := int((places == place).sum()):
            counts[reason] += gone
    splits: dict[str, SplitManifest] = {split: writer.close() for split, writer in writers.items()}
    hashes = np.concatenate([np.load(folder / f"{split}_hashes.npy") for split in SPLITS])
    hashes.sort()
    manifest = DomainManifest(
        domain=name,
        parts=splits,
        dtype=dtype.name,
        vocab_size=settings.vocab_size,
        largest_token=max((shard.largest_token for shard in shards), default=0),
        separator_id=settings.separator_id,
        tokenizer=settings.tokenizer,
        tokenizer_fingerprint=settings.tokenizer_fingerprint,
        sources=tuple(source for shard in shards for source in shard.sources),
        split_seed=settings.split_seed,
        sizes=settings.sizes.to_json(),
        duplicates=int((hashes[1:] == hashes[:-1]).sum()),
        left_out=dict(sorted(counts.items())),
        versions=dict(sorted(settings.versions.items())),
        inputs=inputs,
        bos_mode=settings.bos.mode,
        bos_id=settings.bos.token,
    )
    write_json(folder / MANIFEST_NAME, manifest.to_json())
    return manifest


def write_index(path: Path, *, tokenizer_fingerprint: str, tokenizer_json: str | None) -> Corpus:
    """Write `tokenizer.json`, then `corpus.json` over all domains in the folder, and open the corpus.

    Args:
        tokenizer_json: content of the file; None: the tokenizer is not at hand, and nobody can decode the corpus
            without being told of it.

    Raises:
        ShearingError: there is no domain, or one was written with another tokenizer.
    """
    names = domains_of(path)
    if not names:
        raise ShearingError(str(path), value="no domain", allowed="at least one", mend="prepare a domain")
    manifests = {name: DomainManifest.read(path / name) for name in names}
    for name in names:  # before anything is written: they could be read with the tokenizer that is there
        if manifests[name].tokenizer_fingerprint != tokenizer_fingerprint:
            raise ShearingError(
                str(path / name),
                value="made with another tokenizer",
                allowed=f"the one of the corpus, {tokenizer_fingerprint}",
                mend="remove that domain, or prepare the others in another folder",
            )
    if tokenizer_json is not None:
        write_text(path / TOKENIZER_NAME, tokenizer_json)
    index = {
        "format": FORMAT,
        "domains": names,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        _DIVIDED: {
            name: {"inputs": each.inputs, "splits": _digest(part.hashes_sha256 for part in each.parts.values())}
            for name, each in manifests.items()
        },
    }
    write_json(path / INDEX_NAME, index)
    return Corpus.open(path, tokenizer_fingerprint=tokenizer_fingerprint)


def _digest(checksums: Iterable[str]) -> str:
    """Of the checksums of a domain's hashes, split by split: which text is where, and in which order."""
    return hashlib.sha256(json.dumps(list(checksums)).encode()).hexdigest()[:32]


def _array_sha256(values: npt.NDArray[Any]) -> str:
    """SHA-256 of the .npy file that an array would be."""
    digest = hashlib.sha256()
    np.save(SimpleNamespace(write=digest.update), values)
    return digest.hexdigest()


class _SplitWriter:
    """The files of one split, written as documents come; checksums of tokens are taken on the way to disk."""

    def __init__(self, folder: Path, *, split: Split, documents: int, counted: bool) -> None:
        self._tokens = (folder / f"{split}.bin").open("wb")
        self._digest = hashlib.sha256()
        self._ends = _ArrayFile(folder / f"{split}_ends.npy", length=documents, dtype=np.dtype(np.int64))
        self._hashes = _ArrayFile(folder / f"{split}_hashes.npy", length=documents, dtype=np.dtype(np.uint64))
        self._counted = BitsWriter(counted_path(folder, split)) if counted else None
        self._count = self._bytes = self._end = 0

    def write(self, tokens: npt.NDArray[Any]) -> None:
        data = tokens.tobytes()
        self._digest.update(data)
        self._tokens.write(data)

    def count(self, counted: npt.NDArray[np.bool_]) -> None:
        """Which of the tokens just written count in a loss."""
        assert self._counted is not None
        self._counted.write(counted)

    def describe(self, documents: npt.NDArray[Any]) -> None:
        if not len(documents):
            return
        ends = self._end + np.cumsum(documents["tokens"])
        self._ends.append(ends)
        self._hashes.append(documents["hash"])
        self._count += len(documents)
        self._end = int(ends[-1])
        self._bytes += int(documents["bytes"].sum())

    def close(self) -> SplitManifest:
        _flush(self._tokens)
        self._tokens.close()
        return SplitManifest(
            documents=self._count,
            tokens=self._end,
            bytes=self._bytes,
            sha256=self._digest.hexdigest(),
            ends_sha256=self._ends.close(),
            hashes_sha256=self._hashes.close(),
            counted=None if self._counted is None else self._counted.count,
            counted_sha256=None if self._counted is None else self._counted.close(),
        )


class _ArrayFile:
    """A one-dimensional .npy file of known length, as `numpy.save` writes it, part by part."""

    def __init__(self, path: Path, *, length: int, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype
        self._file = path.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: npt.NDArray[Any]) -> None:
        self._file.write(values.astype(self._dtype, copy=False).tobytes())

    def close(self) -> str:
        """Flush to disk; returns the SHA-256 of the file."""
        _flush(self._file)
        self._file.close()
        return sha256_of_file(self._path)


def _pieces(lengths: npt.NDArray[np.int64]) -> Iterable[tuple[int, int, int, int]]:
    """Runs of whole documents of about `TOKENS_PER_WRITE` tokens: first and last document, first and last token."""
    ends = np.cumsum(lengths)
    begin = start = 0
    while begin < len(lengths):
        end = max(begin + 1, int(np.searchsorted(ends, start + TOKENS_PER_WRITE, side="right")))
        stop = int(ends[end - 1])
        yield begin, end, start, stop
        begin, start = end, stop


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
