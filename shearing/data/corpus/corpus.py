"""A corpus on disk: one folder per domain, flat tokens with document ends, so rows of any length can be cut later.

    CORPUS/corpus.json                written last: a folder without it is an interrupted preparation
    CORPUS/tokenizer.json             the tokenizer itself, to decode with
    CORPUS/DOMAIN/manifest.json       counts and checksums of each part; tokenizer, sources, split seed, versions
    CORPUS/DOMAIN/train.bin           tokens one after the other, each document closed by the separator
    CORPUS/DOMAIN/train_ends.npy      int64, where each document ends in train.bin (separator included)
    CORPUS/DOMAIN/train_hashes.npy    uint64, hash of each document's text: `text_hash`
    CORPUS/DOMAIN/train_counted.bin   one bit for each token, where some do not count in a loss: see `counted`
    CORPUS/DOMAIN/validation.bin, test.bin, …

`validation` is what steers a run and what constants are chosen on, `test` is what judges. Format 2 has one held-out
part in place of the two: see `stored_split`. Tokens of an adopted domain stay in files of another format: `adopted`.

Row i at sequence length S holds tokens [i*S, i*S + S + 1): S inputs, and as last label the first input of row i + 1.
Where rows begin with a token of their own (`bos`), it holds that token and tokens [i*S, i*S + S): all are labels, once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shearing.data.corpus.bos import Bos
from shearing.data.corpus.counted import Counted
from shearing.data.corpus.format import ONE_PART, SPLITS, DomainManifest, HeldOutSplit, Split, read_index
from shearing.data.corpus.integrity import quick_damages
from shearing.data.corpus.stored_split import StoredSplit
from shearing.data.corpus.tokens import Tokens
from shearing.errors import ShearingError, key, nearest_name


def whole_rows(tokens: int, *, sequence_length: int) -> int:
    """Rows in which so many tokens are read: whole ones, at least one."""
    return max(1, tokens // sequence_length)


class Corpus:
    """Tokenised domains, memory-mapped; safe to open in any number of processes. Use `Corpus.open`.

    Attributes:
        path: its folder.
        manifests: of the opened domains.
        all_count: whether every token of them counts in a loss.
    """

    def __init__(self, path: Path, *, manifests: Mapping[str, DomainManifest]) -> None:
        self.path = path
        self.manifests = dict(manifests)
        self._splits: dict[tuple[str, Split], StoredSplit] = {}
        self._tokens: dict[tuple[str, Split], Tokens] = {}
        self._ends: dict[tuple[str, Split], npt.NDArray[np.int64]] = {}
        self._counted: dict[tuple[str, Split], Counted | None] = {}
        self.all_count = all(part.counted is None for each in manifests.values() for part in each.parts.values())

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
            ShearingError: the corpus or a domain is missing, interrupted, empty, damaged or too short, its
                tokens are another tokenizer's, or domains begin their texts in different ways.
        """
        path = Path(path)
        index = read_index(path)
        available: list[str] = index["domains"]
        names = available if domains is None else list(domains)
        if not names:
            raise ShearingError(
                "domains", value=names, allowed=f"at least one of {', '.join(available)}", mend="name a domain"
            )
        manifests = {}
        for name in names:
            if name not in available:
                raise ShearingError(
                    "domains",
                    value=name,
                    allowed=", ".join(available),
                    mend=nearest_name(name, available) or f"prepare the domain {name} into {path}",
                )
            manifests[name] = DomainManifest.read(path / name)
        corpus = cls(path, manifests=manifests)
        if len(begun := {manifest.bos for manifest in manifests.values()}) > 1:
            raise ShearingError(
                "domains",
                value=", ".join(f"{name}: {manifest.bos}" for name, manifest in manifests.items()),
                allowed=f"domains whose texts begin alike; here are {len(begun)} ways",
                mend="leave out those that differ, or prepare all of them with the same bos",
            )
        for name in names:
            corpus._check(name, vocab_size=vocab_size, tokenizer_fingerprint=tokenizer_fingerprint)
        if sequence_length is not None:
            for name in names:
                for split in SPLITS:
                    corpus._checked_rows(name, sequence_length=sequence_length, split=split)
        return corpus

    def only(self, domains: Iterable[str]) -> Corpus:
        """The same corpus with these of its domains, in this order; nothing is read or checked again."""
        return Corpus(self.path, manifests={name: self.manifests[name] for name in domains})

    @property
    def domains(self) -> list[str]:
        return list(self.manifests)

    @property
    def fingerprint(self) -> str:
        """Hash of the opened domains' names and tokens, wherever the corpus lies (hexadecimal, 32 digits)."""
        content = [
            [
                m.domain,
                m.dtype,
                *(part.sha256 for part in m.parts.values()),
                *(part.counted_sha256 for part in m.parts.values() if part.counted_sha256 is not None),
                *m.bos.identity(),
            ]
            for m in self.manifests.values()
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    @property
    def bos(self) -> Bos:
        """How texts begin."""
        return next(iter(self.manifests.values())).bos

    @property
    def of_one_part(self) -> list[str]:
        """Domains, of format 2, whose one held-out part is divided between what steers and what judges."""
        return [name for name, manifest in self.manifests.items() if ONE_PART in manifest.parts]

    def named_split(self, split: HeldOutSplit) -> str:
        """What `split` is, in words for a table."""
        if not self.of_one_part:
            return split
        half = {"validation": "held-out (first half)", "test": "held-out (second half)"}[split]
        return half if len(self.of_one_part) == len(self.domains) else f"{split} or {half}"

    @property
    def notice(self) -> str | None:
        """What users of an old corpus have to know, or None."""
        if not self.of_one_part:
            return None
        return (
            f"{self.path} (format 2) has one held-out part of {', '.join(self.of_one_part)}: the first half of its "
            "documents steers, the second half judges; prepare the text again for splits of their own"
        )

    def split_tokens(self, domain: str, split: Split) -> int:
        """Tokens of a split, separators included."""
        return self._split(domain, split).num_tokens

    def train_rows(self, domain: str, *, sequence_length: int) -> int:
        """Rows of `sequence_length` inputs in the training split.

        Raises:
            ShearingError: there is not even one.
        """
        return self._checked_rows(domain, sequence_length=sequence_length, split="train")

    def heldout_rows(self, domain: str, *, split: HeldOutSplit, sequence_length: int) -> int:
        """Rows of `sequence_length` inputs in a held-out split.

        Raises:
            ShearingError: there is not even one.
        """
        return self._checked_rows(domain, sequence_length=sequence_length, split=split)

    def row(self, domain: str, index: int, *, sequence_length: int, split: Split = "train") -> npt.NDArray[np.int64]:
        """Tokens of one row, int64 [S + 1]: inputs are [:-1], labels [1:]."""
        rows = self.rows([(domain, index)], sequence_length=sequence_length, split=split)
        return rows.reshape(-1)

    def rows(
        self, chosen: Sequence[tuple[str, int]], *, sequence_length: int, split: Split = "train"
    ) -> npt.NDArray[np.int64]:
        """Tokens of many rows; all are asked for before the first is read, so a disk sees them together.

        Args:
            chosen: domain and index of each row.

        Returns:
            int64 [B, S + 1]: inputs are [:, :-1], labels [:, 1:].

        Raises:
            IndexError: there is no such row.
        """
        rows = np.empty((len(chosen), sequence_length + 1), dtype=np.int64)
        front = self.bos.in_row
        if self.bos.token is not None:
            rows[:, :front] = self.bos.token
        length = sequence_length + 1 - front
        readers = [self.tokens(domain, split=split) for domain, _ in chosen]
        starts = [max(0, index) * sequence_length for _, index in chosen]
        for tokens, start in zip(readers, starts, strict=True):
            tokens.expect(start, start + length)
        for i, (domain, index) in enumerate(chosen):
            row = readers[i].read(starts[i], starts[i] + length)
            if index < 0 or len(row) != length:
                raise IndexError(f"row {index} of {domain}/{split} at sequence length {sequence_length}")
            rows[i, front:] = row
        return rows

    def tokens(self, domain: str, *, split: Split = "train") -> Tokens:
        """All tokens of a split."""
        key = (domain, split)
        if key not in self._tokens:
            self._tokens[key] = self._split(domain, split).open_tokens()
        return self._tokens[key]

    def document_ends(self, domain: str, *, split: Split = "train") -> npt.NDArray[np.int64]:
        """Where each document ends in the split's tokens, its separator included; int64 [documents]."""
        if (domain, split) not in self._ends:
            self._ends[domain, split] = self._split(domain, split).document_ends()
        return self._ends[domain, split]

    def row_positions(
        self, domain: str, index: int, *, sequence_length: int, split: Split = "train"
    ) -> npt.NDArray[np.int64]:
        """Of each token of a row, how many of its document's come before it in this row; int64 [S + 1].

        It is 0 where a document begins, and where the row does. Read from the documents' ends, so a separator inside a
        text is a token like others. A token in front of the row counts as one of the document that the row begins with.
        """
        begins = self._begins(domain, np.array([index]), sequence_length=sequence_length, split=split)
        places = np.arange(sequence_length + 1)
        latest = np.zeros_like(places)
        latest[begins] = begins
        positions: npt.NDArray[np.int64] = places - np.maximum.accumulate(latest)
        return positions

    def counted(
        self, chosen: Sequence[tuple[str, int]], *, sequence_length: int, split: Split = "train"
    ) -> npt.NDArray[np.bool_] | None:
        """Which tokens of rows count in a loss, bool [B, S + 1]; None where all tokens of the corpus do.

        Args:
            chosen: domain and index of each row.
        """
        if self.all_count:
            return None
        rows, front = np.ones((len(chosen), sequence_length + 1), dtype=np.bool_), self.bos.in_row
        for i, (domain, index) in enumerate(chosen):
            if (of_domain := self._counted_of(domain, split)) is not None:
                start = index * sequence_length
                rows[i, front:] = of_domain.read(start, start + sequence_length + 1 - front)
        return rows

    def labels_left_out(
        self,
        domain: str,
        indices: npt.NDArray[np.int64],
        *,
        sequence_length: int,
        loss_across: bool,
        split: Split = "train",
    ) -> int:
        """How many labels of these rows do not count.

        Args:
            loss_across: whether labels that are the first token of a document count.
        """
        settings: dict[str, Any] = {"sequence_length": sequence_length, "split": split}
        if self._counted_of(domain, split) is None:
            return 0 if loss_across else len(self._begins(domain, indices, **settings))
        counted = self.counted([(domain, int(index)) for index in indices], **settings)
        assert counted is not None
        labels = counted[:, 1:]
        if not loss_across:
            for row, index in zip(labels, indices, strict=True):
                row[self._begins(domain, np.array([index]), **settings) - 1] = False
        return int((~labels).sum())

    def _begins(
        self, domain: str, indices: npt.NDArray[np.int64], *, sequence_length: int, split: Split
    ) -> npt.NDArray[np.int64]:
        """Places 1 … S of these rows where documents begin, row by row; not right behind what every row begins with."""
        ends = self.document_ends(domain, split=split)
        starts, front = indices * sequence_length, self.bos.in_row
        # A document begins where the one before it ends.
        bounds = np.searchsorted(ends, np.stack([starts, starts + sequence_length - front], 1), side="right")
        parts = [ends[first:last] - start + front for (first, last), start in zip(bounds.tolist(), starts, strict=True)]
        return np.concatenate(parts)

    def document_hashes(self, domain: str, *, split: Split = "train") -> npt.NDArray[np.uint64]:
        """`text_hash` of each document of the split, in order; uint64 [documents], memory-mapped."""
        return self._split(domain, split).hashes()

    def heldout_batches(
        self, domain: str, *, split: HeldOutSplit, sequence_length: int, tokens: int, micro_batch_size: int
    ) -> Iterator[Tensor]:
        """A fixed subset of the rows of a held-out split, spread evenly over it, in order.

        Args:
            split: validation where something is chosen by what is found, test where a result is judged.
            tokens: how many tokens to read at most; at least one row, never more than there are.
            micro_batch_size: rows per batch; the last batch may have fewer.

        Yields:
            int64 [B, S + 1].
        """
        indices = self._heldout_subset(domain, split=split, sequence_length=sequence_length, tokens=tokens)
        for start in range(0, len(indices), micro_batch_size):
            chosen = indices[start : start + micro_batch_size]
            batch = self.rows([(domain, i) for i in chosen], sequence_length=sequence_length, split=split)
            yield torch.from_numpy(batch)

    def heldout_positions(
        self, domain: str, *, split: HeldOutSplit, sequence_length: int, tokens: int, micro_batch_size: int
    ) -> Iterator[Tensor]:
        """`row_positions` of what `heldout_batches` yields, int64 [B, S + 1]."""
        indices = self._heldout_subset(domain, split=split, sequence_length=sequence_length, tokens=tokens)
        for start in range(0, len(indices), micro_batch_size):
            chosen = indices[start : start + micro_batch_size]
            batch = [self.row_positions(domain, i, sequence_length=sequence_length, split=split) for i in chosen]
            yield torch.from_numpy(np.stack(batch))

    def heldout_begins(
        self, domain: str, *, split: HeldOutSplit, sequence_length: int, tokens: int, micro_batch_size: int
    ) -> Iterator[Tensor]:
        """Whether a document begins where each row does that `heldout_batches` yields, bool [B]."""
        indices = self._heldout_subset(domain, split=split, sequence_length=sequence_length, tokens=tokens)
        ends = self.document_ends(domain, split=split)
        for start in range(0, len(indices), micro_batch_size):
            firsts = np.array(indices[start : start + micro_batch_size]) * sequence_length
            before = np.minimum(np.searchsorted(ends, firsts), len(ends) - 1)
            yield torch.from_numpy((firsts == 0) | (ends[before] == firsts))

    def heldout_counted(
        self, domain: str, *, split: HeldOutSplit, sequence_length: int, tokens: int, micro_batch_size: int
    ) -> Iterator[Tensor | None]:
        """`counted` of what `heldout_batches` yields."""
        indices = self._heldout_subset(domain, split=split, sequence_length=sequence_length, tokens=tokens)
        for start in range(0, len(indices), micro_batch_size):
            chosen = [(domain, index) for index in indices[start : start + micro_batch_size]]
            batch = self.counted(chosen, sequence_length=sequence_length, split=split)
            yield None if batch is None else torch.from_numpy(batch)

    def heldout_tokens(self, *, split: HeldOutSplit, sequence_length: int, tokens_per_domain: int) -> int:
        """Inputs in what `heldout_batches` yields for all domains together."""
        subsets = [
            self._heldout_subset(domain, split=split, sequence_length=sequence_length, tokens=tokens_per_domain)
            for domain in self.domains
        ]
        return sum(map(len, subsets)) * sequence_length

    def _counted_of(self, domain: str, split: Split) -> Counted | None:
        if (domain, split) not in self._counted:
            self._counted[domain, split] = self._split(domain, split).counted()
        return self._counted[domain, split]

    def _split(self, domain: str, split: Split) -> StoredSplit:
        if (domain, split) not in self._splits:
            manifest = self.manifests[domain]
            self._splits[domain, split] = StoredSplit.find(self.path / domain, split=split, manifest=manifest)
        return self._splits[domain, split]

    def _heldout_subset(self, domain: str, *, split: HeldOutSplit, sequence_length: int, tokens: int) -> list[int]:
        rows = self.heldout_rows(domain, split=split, sequence_length=sequence_length)
        count = min(rows, whole_rows(tokens, sequence_length=sequence_length))
        return [i * rows // count for i in range(count)]

    def _checked_rows(self, domain: str, *, sequence_length: int, split: Split) -> int:
        tokens = self.split_tokens(domain, split)
        longest = tokens - 1 + self.bos.in_row
        rows = longest // sequence_length
        if rows < 1:
            raise ShearingError(
                "sequence_length",
                value=sequence_length,
                allowed=f"at most {longest}, as domain {domain} has {tokens} tokens of {split} text",
                mend=f"choose a shorter sequence, prepare more text for {domain}, or leave it out of {key('domains')}",
            )
        return rows

    def _check(self, domain: str, *, vocab_size: int | None, tokenizer_fingerprint: str | None) -> None:
        manifest = self.manifests[domain]
        for part, counts in manifest.parts.items():
            if counts.tokens == 0:
                raise self._empty(domain, value=f"0 tokens in {part}")
            if counts.counted == 0:
                raise self._empty(domain, value=f"no token in {part} that counts in a loss")
        for damage in quick_damages(self.path / domain, manifest=manifest):
            raise damage.error()
        if ONE_PART in manifest.parts and manifest.parts[ONE_PART].documents < 2:
            raise self._empty(domain, value="one held-out document, which cannot both steer and judge")
        if vocab_size is not None and manifest.largest_token >= vocab_size:
            raise ShearingError(
                "corpus",
                value=f"{self.path} (domain {domain} has token id {manifest.largest_token})",
                allowed=f"token ids below the model's vocabulary of {vocab_size}",
                mend="prepare the text again with the tokenizer of this model",
            )
        if tokenizer_fingerprint is not None and manifest.tokenizer_fingerprint != tokenizer_fingerprint:
            raise ShearingError(
                "corpus",
                value=f"{self.path} (domain {domain} was tokenised with {manifest.tokenizer}, "
                f"fingerprint {manifest.tokenizer_fingerprint})",
                allowed=f"tokens of the model's own tokenizer, fingerprint {tokenizer_fingerprint}",
                mend="prepare the text again with the tokenizer of this model",
            )

    def _empty(self, domain: str, *, value: str) -> ShearingError:
        return ShearingError(
            f"{self.path / domain}",
            value=value,
            allowed=f"a domain with text in each of {', '.join(SPLITS)}",
            mend=f"prepare the domain {domain} again from more text, or leave it out of {key('domains')}",
        )
