"""Tokenised sets of other kinds as domains of a corpus, without a copy of their tokens: `shear data adopt`.

What is written is where documents lie, which of them are held out, and their hashes. A document is known by its tokens
(BLAKE2b of them as little-endian 32-bit numbers, a separator at the end left out), so equal documents are on one side,
in whatever sets and types they lie.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from data_tools.adoption.arrow_folder import arrow_files, find_in_arrow
from data_tools.adoption.datatrove_files import datatrove_files, find_in_datatrove
from data_tools.adoption.foreign import ForeignFile, ForeignSet
from data_tools.checksums import sha256_of_tokens
from data_tools.corpus_output import (
    alone_in,
    publishing,
    require_begun_alike,
    require_no_newcomers,
    require_tokenizer,
    standing,
)
from data_tools.tokenizer import NamedTokenizer, load_tokenizer
from shearing.data.corpus.adopted import Adopted, AdoptedFile, AdoptedTokens, Separators, ranges_path
from shearing.data.corpus.bos import Bos
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.domain_folder import (
    earlier_texts,
    is_complete,
    make_corpus_folder,
    require_divided_as_before,
    write_index,
)
from shearing.data.corpus.format import (
    MANIFEST_NAME,
    SPLITS,
    DomainManifest,
    SourceFile,
    Split,
    SplitManifest,
    require_domain_name,
)
from shearing.data.corpus.shards import token_dtype
from shearing.data.corpus.splits import SIZE_FORMS, Documents, Sides, SplitSize, SplitSizes, choose_splits
from shearing.errors import ShearingError, named
from shearing.evaluation.text_bytes import TokenBytes, token_bytes
from shearing.files.checksums import sha256_of_file
from shearing.files.durable import flush_folder, flush_tree, read_json, write_json
from shearing.files.mapped_arrays import map_file
from shearing.progress import activity
from shearing.runs.names import COMPONENT_NAMES

# Enough for arithmetic on arrays to pay, little beside what a process takes anyway.
TOKENS_AT_A_TIME = 1 << 22
SPLIT_SEED = 0
_CHOSEN = ".adopting.json"
"""File of a corpus: what the held-out documents of domains that are not in their places yet were chosen for."""

_EXPLAINED: dict[Separators, str] = {
    "present": "documents end in the separator",
    "appended": "documents do not all end in the separator: the reader adds it",
    "inside": "rows are pieces of one stream, with separators inside: they are read as they are",
}

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Read:
    """What reading a set has told of its documents, in order; arrays are [documents].

    Attributes:
        file_ids, firsts, lengths: where each lies; `lengths` without a separator at the end.
        lasts: last token of each, -1 of an empty one.
        closed: whether that is the separator.
        begun: whether the first is the token that the tokenizer begins a text with.
        hashes: of its tokens without that separator; uint64.
        num_bytes: of its text.
        inner_separators: of all documents together.
    """

    file_ids: Counts
    firsts: Counts
    lengths: Counts
    lasts: Counts
    closed: npt.NDArray[np.bool_]
    begun: npt.NDArray[np.bool_]
    hashes: npt.NDArray[np.uint64]
    num_bytes: Counts
    largest_token: int
    inner_separators: int
    empty: int

    def bos(self, token: int | None) -> Bos:
        """How the texts begin: with this token only if all of them do."""
        whole = token is not None and self.separators != "inside" and bool(self.begun.all())
        return Bos("document", token) if whole else Bos()

    @property
    def separators(self) -> Separators:
        """Where the separator of a document comes from."""
        if self.closed.all():
            return "present"
        # Pieces of one long text: most hold separators, few happen to end in one.
        if self.inner_separators > len(self.closed) // 2 and self.closed.mean() < 0.5:
            return "inside"
        return "appended"


def adopt(
    *,
    domains: Mapping[str, Path],
    tokenizer: str,
    output: Path,
    validation: str,
    test: str,
    separator_token: str | None,
    console: Console,
) -> Corpus:
    """Make a corpus of tokenised sets where they lie; domains that are there already, from the same files, are kept.

    Args:
        domains: file or folder of each domain.
        tokenizer: the one that made the tokens: folder or hub name.
        output: folder of the corpus; may hold domains, adopted or prepared.
        validation, test: "5%" or "2M tokens" of each domain.
        separator_token: token after each document; None: the tokenizer's end-of-sequence token.

    Raises:
        ShearingError: a set cannot be used, its tokens are not of this tokenizer, or nothing of it can be held out.
    """
    try:
        sizes = SplitSizes(SplitSize.parse(validation), SplitSize.parse(test))
    except ValueError as error:
        raise ShearingError(
            "--validation, --test",
            value=[validation, test],
            allowed=f"{SIZE_FORMS}; shares below 100% together",
            mend="write two such",
        ) from error
    for name in domains:
        require_domain_name(name)
    sets = {name: find_documents(path, field=f"--domain {name}") for name, path in domains.items()}
    loaded = load_tokenizer(tokenizer, separator_token=separator_token)
    if loaded.notice:
        console.print(loaded.notice, style="yellow", soft_wrap=True, highlight=False, markup=False)
    with named({"tokenizer": "--tokenizer", "output": "--output"}):
        require_tokenizer(output, tokenizer=loaded.name, fingerprint=loaded.fingerprint)
        make_corpus_folder(output)
        with alone_in(output):
            return _adopted(sets, output=output, sizes=sizes, tokenizer=loaded, console=console)


def _adopted(
    sets: Mapping[str, ForeignSet], *, output: Path, sizes: SplitSizes, tokenizer: NamedTokenizer, console: Console
) -> Corpus:
    inputs = {name: _inputs(found, tokenizer=tokenizer, sizes=sizes) for name, found in sets.items()}
    wanted = {name: found for name, found in sets.items() if not is_complete(output / name, inputs=inputs[name])}
    for name, found in wanted.items():
        if found.tokenizer is not None and found.tokenizer not in (tokenizer.name, tokenizer.full.name_or_path):
            console.print(
                f"{name} was tokenised with {found.tokenizer}, as it says; read with {tokenizer.name}", soft_wrap=True
            )
    # Held-out documents of all were chosen together, besides those of other domains: what a start that was interrupted
    # has written is used as a whole or not at all.
    known = standing(output)
    others = {name: digest for name, digest in known.items() if name not in sets}
    chosen_by, chosen = output / _CHOSEN, {"inputs": inputs, "others": others}
    is_written = chosen_by.is_file() and read_json(chosen_by) == chosen
    if not (is_written and all(is_complete(_partial(output, name), inputs=inputs[name]) for name in wanted)):
        chosen_by.unlink(missing_ok=True)
        _write_domains(wanted, output=output, sizes=sizes, inputs=inputs, tokenizer=tokenizer, console=console)
        write_json(chosen_by, chosen)
    with publishing(output), named(COMPONENT_NAMES):
        require_no_newcomers(output, known=lambda: known)
        for name in wanted:
            _partial(output, name).rename(output / name)
        flush_folder(output)
        corpus = write_index(
            output, tokenizer_fingerprint=tokenizer.fingerprint, tokenizer_json=tokenizer.backend.to_str()
        )
    chosen_by.unlink()
    return corpus


def _partial(output: Path, name: str) -> Path:
    return output / f".partial-{name}"


def _write_domains(
    wanted: Mapping[str, ForeignSet],
    *,
    output: Path,
    sizes: SplitSizes,
    inputs: Mapping[str, str],
    tokenizer: NamedTokenizer,
    console: Console,
) -> None:
    """Write all domains, none of them in its place yet."""
    read = {
        name: _read_domain(name, found=found, tokenizer=tokenizer, console=console) for name, found in wanted.items()
    }
    for name, each in read.items():
        _require_separator(name, each, tokenizer=tokenizer)
        bos = each.bos(tokenizer.begin_id)
        require_begun_alike(output, bos=bos, field=f"--domain {name}", mend="sets whose texts begin so")
        console.print(f"{name}: {_EXPLAINED[each.separators]}", soft_wrap=True)
    documents = {name: Documents(hashes=each.hashes, tokens=each.lengths + 1) for name, each in read.items()}
    sides = choose_splits(documents, sizes=sizes, seed=SPLIT_SEED, earlier=earlier_texts(output, besides=wanted))
    require_divided_as_before(output, domains=documents, places=sides, inputs=inputs)
    for name, found in wanted.items():
        _write_domain(
            output,
            name,
            found=found,
            read=read[name],
            sides=sides[name],
            sizes=sizes,
            inputs=inputs[name],
            tokenizer=tokenizer,
            console=console,
        )


def find_documents(path: Path, *, field: str) -> ForeignSet:
    """The documents of the tokenised set at `path`.

    Args:
        path: a `.ds` file or a folder of them, as datatrove and nanotron write them; or a folder that `save_to_disk`
            of `datasets` wrote, with a column `input_ids`.
        field: what the user calls it.

    Raises:
        ShearingError: it is neither, or damaged.
    """
    if files := datatrove_files(path):
        return find_in_datatrove(files)
    if files := arrow_files(path, field=field):
        return find_in_arrow(files)
    raise ShearingError(
        field,
        value=str(path),
        allowed="a .ds file or a folder of them (datatrove, nanotron), or a folder written by save_to_disk (datasets)",
        mend="correct the path" if not path.exists() else "prepare raw text with `shear data prepare`",
    )


def _require_separator(name: str, read: _Read, *, tokenizer: NamedTokenizer) -> None:
    """Refuse documents that end in another special token: nobody wants two of them after each."""
    counts = np.bincount(read.lasts)
    last, total = int(counts.argmax()), len(read.lasts)
    special = last != tokenizer.separator_id and last in tokenizer.full.all_special_ids
    if special and counts[last] > total // 2:
        token = tokenizer.full.convert_ids_to_tokens(last)
        raise ShearingError(
            "--separator-token",
            value=tokenizer.full.convert_ids_to_tokens(tokenizer.separator_id),
            allowed=f"the token that documents of {name} end in: {counts[last]:,} of {total:,} end in {token}",
            mend=f"add --separator-token '{token}'",
        )


def _inputs(found: ForeignSet, *, tokenizer: NamedTokenizer, sizes: SplitSizes) -> str:
    files = [[str(file.path.resolve()), *_stamp(file.path)] for file in found.files]
    settings = [files, tokenizer.fingerprint, tokenizer.separator_id, sizes.to_json(), SPLIT_SEED]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read_domain(name: str, *, found: ForeignSet, tokenizer: NamedTokenizer, console: Console) -> _Read:
    total = sum(int(file.lengths.sum()) for file in found.files)
    known = token_bytes(tokenizer.full, vocab_size=tokenizer.vocab_size)
    parts = []
    with activity(f"{name}: documents", total=max(1, total), console=console) as advance:
        for index, file in enumerate(found.files):
            for piece in _pieces(file):
                part = _described(index, file, piece, tokenizer=tokenizer, known=known)
                parts.append(part)
                advance(int(part.lengths.sum()))
    if not parts:
        raise ShearingError(f"--domain {name}", value="no documents", allowed="at least three", mend="name another set")
    columns = {
        key: np.concatenate([getattr(part, key) for part in parts])
        for key in ("file_ids", "firsts", "lengths", "lasts", "closed", "begun", "hashes", "num_bytes")
    }
    kept = columns["lengths"] > 0
    return _Read(
        **{key: column[kept] for key, column in columns.items()},
        largest_token=max(part.largest_token for part in parts),
        inner_separators=sum(part.inner_separators for part in parts),
        empty=int((~kept).sum()),
    )


def _pieces(file: ForeignFile) -> Iterator[slice]:
    """Documents that lie one after the other, in pieces of at most `TOKENS_AT_A_TIME` unless one is longer alone."""
    breaks = np.flatnonzero(file.firsts[1:] != file.firsts[:-1] + file.lengths[:-1]) + 1
    bounds = [0, *breaks.tolist(), len(file.firsts)]
    ends = np.cumsum(file.lengths)
    for start, stop in pairwise(bounds):
        while start < stop:
            before = int(ends[start - 1]) if start else 0
            last = int(np.searchsorted(ends[start:stop], before + TOKENS_AT_A_TIME, side="right")) + start
            last = max(last, start + 1)
            yield slice(start, last)
            start = last


def _described(
    index: int, file: ForeignFile, piece: slice, *, tokenizer: NamedTokenizer, known: TokenBytes | None
) -> _Read:
    """What one piece of a file says."""
    firsts, lengths = file.firsts[piece], file.lengths[piece]
    begin = int(firsts[0])
    tokens = map_file(file.path, dtype=file.dtype)[begin : int(firsts[-1] + lengths[-1])]
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.vocab_size:
        raise ShearingError(
            str(file.path),
            value=f"token ids from {tokens.min()} to {tokens.max()}",
            allowed=f"0 to {tokenizer.vocab_size - 1}, the vocabulary of {tokenizer.name}",
            mend="name the tokenizer that made these tokens with --tokenizer",
        )
    ids = tokens.astype("<u4")
    ends = firsts - begin + lengths
    lasts = np.full(len(lengths), -1, dtype=np.int64)
    some = lengths > 0
    lasts[some] = ids[ends[some] - 1]
    closed = lasts == tokenizer.separator_id
    begun = np.zeros(len(lengths), dtype=np.bool_)
    if tokenizer.begin_id not in (None, tokenizer.separator_id):
        begun[some] = ids[firsts[some] - begin] == tokenizer.begin_id
    lengths = lengths - closed
    starts, stops = (firsts - begin).tolist(), (firsts - begin + lengths).tolist()
    content = ids.data
    hashes = [
        int.from_bytes(hashlib.blake2b(content[start:stop], digest_size=8).digest(), "big")
        for start, stop in zip(starts, stops, strict=True)
    ]
    return _Read(
        file_ids=np.full(len(lengths), index, dtype=np.int64),
        firsts=firsts,
        lengths=lengths,
        lasts=lasts,
        closed=closed,
        begun=begun,
        hashes=np.array(hashes, dtype=np.uint64),
        num_bytes=_text_bytes(
            ids, starts=(firsts - begin + begun).tolist(), stops=stops, tokenizer=tokenizer, known=known
        ),
        largest_token=int(ids.max()) if len(ids) else 0,
        inner_separators=int((ids == tokenizer.separator_id).sum() - closed.sum()),
        empty=0,
    )


def _text_bytes(
    ids: npt.NDArray[np.uint32],
    *,
    starts: list[int],
    stops: list[int],
    tokenizer: NamedTokenizer,
    known: TokenBytes | None,
) -> Counts:
    """Bytes of the text of each document: from what each token stands for, or by decoding where tokens do not say."""
    if known is None:
        documents = [ids[start:stop].tolist() for start, stop in zip(starts, stops, strict=True)]
        return np.array([len(text.encode()) for text in tokenizer.backend.decode_batch(documents)], dtype=np.int64)
    sums = np.concatenate([[0], np.cumsum(known.length.numpy()[ids])])
    some = np.array(starts) < np.array(stops)
    added = (known.length - known.first).numpy()[ids[np.array(starts)[some]]]
    counts: Counts = sums[stops] - sums[starts]
    counts[some] -= added
    return counts


def _write_domain(
    output: Path,
    name: str,
    *,
    found: ForeignSet,
    read: _Read,
    sides: Sides,
    sizes: SplitSizes,
    inputs: str,
    tokenizer: NamedTokenizer,
    console: Console,
) -> None:
    folder = _partial(output, name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    stamps = [_stamp(file.path) for file in found.files]
    adopted = Adopted(
        format=found.kind,
        separators=read.separators,
        files=tuple(
            AdoptedFile(str(file.path.resolve()), file.dtype, num_bytes, mtime)
            for file, (num_bytes, mtime) in zip(found.files, stamps, strict=True)
        ),
    )
    adopted.write(folder)
    dtype, bos = token_dtype(tokenizer.vocab_size).name, read.bos(tokenizer.begin_id)
    # A separator that the reader appends is a token of the corpus, and need be in none of the files.
    appended = tokenizer.separator_id if adopted.separators == "appended" else 0
    chosen = {split: sides == place for place, split in enumerate(SPLITS)}
    for split in SPLITS:
        _save_split(folder, split, read=read, chosen=chosen[split], separators=adopted.separators)
    tokens = {
        split: AdoptedTokens.open(folder, part=split, adopted=adopted, separator_id=tokenizer.separator_id, dtype=dtype)
        for split in SPLITS
    }
    total = sum(num_bytes for num_bytes, _ in stamps) + sum(
        len(each) * np.dtype(dtype).itemsize for each in tokens.values()
    )
    with activity(f"{name}: checksums", total=max(1, total), console=console) as advance:
        sources = tuple(
            SourceFile(file.path, file.bytes, f"sha256:{sha256_of_file(Path(file.path), advance=advance)}")
            for file in adopted.files
        )
        parts: dict[str, SplitManifest] = {
            split: SplitManifest(
                documents=int(chosen[split].sum()),
                tokens=len(tokens[split]),
                bytes=int(read.num_bytes[chosen[split]].sum()),
                sha256=sha256_of_tokens(tokens[split], dtype=dtype, advance=advance),
                ends_sha256=sha256_of_file(folder / f"{split}_ends.npy"),
                hashes_sha256=sha256_of_file(folder / f"{split}_hashes.npy"),
            )
            for split in SPLITS
        }
    manifest = DomainManifest(
        domain=name,
        parts=parts,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        largest_token=max(read.largest_token, appended),
        separator_id=tokenizer.separator_id,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        sources=sources,
        split_seed=SPLIT_SEED,
        sizes=sizes.to_json(),
        duplicates=len(read.hashes) - len(np.unique(read.hashes)),
        left_out={"empty": read.empty} if read.empty else {},
        versions={package: version(package) for package in ("shearing", "numpy")},
        inputs=inputs,
        bos_mode=bos.mode,
        bos_id=bos.token,
    )
    flush_tree(folder)
    write_json(folder / MANIFEST_NAME, manifest.to_json())


def _save_split(
    folder: Path, split: Split, *, read: _Read, chosen: npt.NDArray[np.bool_], separators: Separators
) -> None:
    # A separator that the reader appends is none that is in the file; where it is none of ours to add, all stays.
    lengths = read.lengths[chosen] + (1 if separators == "appended" else read.closed[chosen])
    ends = np.cumsum(lengths)
    file_ids, firsts = read.file_ids[chosen], read.firsts[chosen]
    if separators == "appended":
        last_of_range = np.ones(len(ends), dtype=np.bool_)
    else:
        goes_on = (file_ids[1:] == file_ids[:-1]) & (firsts[1:] == firsts[:-1] + lengths[:-1])
        last_of_range = np.append(~goes_on, True)
    first_of_range = np.append(True, last_of_range[:-1])
    arrays: dict[Path, npt.NDArray[Any]] = {
        folder / f"{split}_ends.npy": ends,
        folder / f"{split}_hashes.npy": read.hashes[chosen],
        ranges_path(folder, split): np.stack([ends[last_of_range], file_ids[first_of_range], firsts[first_of_range]]),
    }
    for path, array in arrays.items():
        with path.open("wb") as file:
            np.save(file, np.ascontiguousarray(array))
