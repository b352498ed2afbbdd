"""A teacher cache on disk: what a teacher says of rows of a corpus, by domain and row.

    CACHE/cache.json                      written last: a folder without it is not finished
    CACHE/DOMAIN/piece-00000000.safetensors   rows 0 … R - 1 of the domain, or those of them that were asked for
    CACHE/DOMAIN/piece-00000001.safetensors   rows R … 2 R - 1, …

Which tokens a row has depends on the corpus and the sequence length alone, not on domain weights, processes or where a
run was interrupted, so a cache stays good for all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import DomainManifest
from shearing.errors import ShearingError, key
from shearing.files.checksums import Advance, sha256_of_file
from shearing.files.durable import read_json
from shearing.objectives.teacher_cache.form import FORMS, Form, form_of
from shearing.objectives.teacher_cache.pieces import WRITE_AGAIN, Piece, damage_of
from shearing.objectives.teacher_cache.said import Said

INDEX_NAME = "cache.json"
FORMAT = 1
_PIECES_OPEN = 1024
_WRITE = "shear data teacher"


def domain_fingerprint(manifest: DomainManifest) -> str:
    """Hash of the training text of a domain, wherever it lies (hexadecimal, 32 digits)."""
    content = [manifest.dtype, manifest.train.sha256, manifest.train.ends_sha256, *manifest.bos.identity()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What everything in a cache depends on, beside the text.

    Attributes:
        teacher: its fingerprint, see `models.stored_model.stored_fingerprint`.
        vocab_size: V.
        sequence_length: S, inputs of a row.
        attention: whether tokens attend to all of their row, or to their own document alone.
        precision: of the teacher's weights and products: bf16 or fp32.
        form: what is kept.
    """

    teacher: str
    vocab_size: int
    sequence_length: int
    attention: Literal["full", "documents"]
    precision: Literal["bf16", "fp32"]
    form: Form

    def to_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` gives back an equal one."""
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "form": self.form.settings()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls(**{**values, "form": form_of(values["form"])})


@dataclass(frozen=True, kw_only=True)
class PieceRecord:
    """A piece as the index has it.

    Attributes:
        number: rows `number` * R on.
        rows: how many of these it has.
        bytes: size of the file.
        sha256: of the file.
        spans: which rows they are, see `spans_of`: where the file is lost, nothing else says so. Empty in an index that
            was written before it had them.
    """

    number: int
    rows: int
    bytes: int
    sha256: str
    spans: str = ""


@dataclass(frozen=True, kw_only=True)
class DomainRecord:
    """A domain as the index has it.

    Attributes:
        fingerprint: see `domain_fingerprint`.
        pieces: in order.
    """

    fingerprint: str
    pieces: Sequence[PieceRecord]


def spans_of(rows: npt.NDArray[np.int64]) -> str:
    """Some ascending rows, as first and last of each stretch: `0-12 15-15`."""
    stretches = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    return " ".join(f"{stretch[0]}-{stretch[-1]}" for stretch in stretches)


def rows_of_spans(spans: str) -> npt.NDArray[np.int64]:
    """What `spans_of` was given; none of an empty string."""
    ends = (map(int, span.split("-")) for span in spans.split())
    return np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(first, last + 1) for first, last in ends)])


def piece_path(folder: Path, *, domain: str, number: int) -> Path:
    """The file of a piece."""
    return folder / domain / f"piece-{number:08d}.safetensors"


def pieces_in(folder: Path, *, domain: str) -> list[int]:
    """Numbers of the pieces of a domain whose files are there, whatever is in them."""
    paths = (folder / domain).glob(f"piece-{'[0-9]' * 8}.safetensors")
    return sorted(int(path.stem.removeprefix("piece-")) for path in paths)


def piece_mark(conditions: Conditions, *, domain: str, fingerprint: str, number: int) -> str:
    """Says which piece of which cache it is."""
    content = json.dumps([FORMAT, conditions.to_json(), fingerprint], sort_keys=True)
    return f"{domain} {number} {hashlib.sha256(content.encode()).hexdigest()[:32]}"


def index_of(
    conditions: Conditions, *, name: str, rows_per_piece: int, domains: Mapping[str, DomainRecord]
) -> dict[str, Any]:
    """Content of `cache.json`.

    Args:
        conditions: of all that is in it.
        name: of the teacher, for people.
        rows_per_piece: R.
        domains: by name.
    """
    of_domains = {domain: asdict(record) for domain, record in domains.items()}
    head = {"format": FORMAT, "name": name, "rows_per_piece": rows_per_piece}
    return {**head, "conditions": conditions.to_json(), "domains": of_domains}


def domains_of(index: Mapping[str, Any]) -> dict[str, DomainRecord]:
    """The domains that `index_of` was given.

    Raises:
        KeyError, TypeError: it has none of its form.
    """
    return {
        domain: DomainRecord(
            fingerprint=record["fingerprint"], pieces=[PieceRecord(**piece) for piece in record["pieces"]]
        )
        for domain, record in index["domains"].items()
    }


class TeacherCache:
    """A cache, memory-mapped; safe to open in any number of processes. Use `TeacherCache.open`.

    Attributes:
        path: its folder.
        name: of the teacher, as it was called when the cache was written.
        conditions: what everything in it depends on.
        domains: by name.
        rows_per_piece: R.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        conditions: Conditions,
        domains: Mapping[str, DomainRecord],
        rows_per_piece: int,
    ) -> None:
        self.path, self.name, self.conditions = path, name, conditions
        self.domains, self.rows_per_piece = domains, rows_per_piece
        self._numbers = {domain: {each.number for each in record.pieces} for domain, record in domains.items()}
        self._piece = lru_cache(_PIECES_OPEN)(
            lambda domain, number: Piece.open(piece_path(path, domain=domain, number=number))
        )

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a finished cache; every file is there, whole and in its place.

        Raises:
            ShearingError: there is none, it is not finished, or a file is missing, truncated or another one.
        """
        index = path / INDEX_NAME
        if not index.is_file():
            raise ShearingError(
                "cache",
                value=f"{path} without {INDEX_NAME}" if path.is_dir() else str(path),
                allowed=f"the folder of a finished teacher cache, see {_WRITE}",
                mend=f"write it: {_WRITE} CORPUS --model MODEL -o {path}; the same command continues one that was "
                "interrupted",
            )
        values = read_json(index)
        try:
            if values["format"] != FORMAT or values["conditions"]["form"]["name"] not in FORMS:
                raise ValueError(f"format {values['format']}, form {values['conditions']['form']}")
            cache = cls(
                path,
                name=values["name"],
                conditions=Conditions.from_json(values["conditions"]),
                domains=domains_of(values),
                rows_per_piece=values["rows_per_piece"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ShearingError(
                str(index), value=str(error), allowed="the index of a teacher cache", mend="write the cache again"
            ) from error
        cache._require_whole()
        return cache

    def require_serves(self, *, kind: str, top_k: int, temperature: float) -> None:
        """Check that the divergence can be had from what is kept.

        Args:
            kind: of `DIVERGENCES`.
            top_k: K, of the kind that keeps only some tokens.
            temperature: of both distributions.

        Raises:
            ShearingError: it cannot.
        """
        form = self.conditions.form
        if kind != form.kind:
            raise ShearingError(
                "kind",
                value=kind,
                allowed=f"{form.kind}, which is all that {self.path} can give ({form.words})",
                mend=f"set {key('kind')}={form.kind}, write a cache of another form, or set {key('cache')}=null",
            )
        if (kept := form.settings().get("top_k", top_k)) != top_k:
            raise ShearingError(
                "top_k",
                value=top_k,
                allowed=f"{kept}, which {self.path} keeps",
                mend=f"set {key('top_k')}={kept}, or write another cache",
            )
        if temperature != 1:
            raise ShearingError(
                "temperature",
                value=temperature,
                allowed=f"1 with {key('cache')}: what is kept of a distribution is of one temperature",
                mend=f"set {key('temperature')}=1 or {key('cache')}=null",
            )

    def require_made_for(
        self,
        *,
        corpus: Corpus,
        teacher: str,
        called: str,
        vocab_size: int,
        sequence_length: int,
        attention: str,
        precision: str | None,
    ) -> None:
        """Check that it is of this text, cut and read like this, and of this teacher.

        Args:
            corpus: whose rows are trained on.
            teacher: its fingerprint.
            called: what people call the teacher.
            vocab_size: of the student.
            sequence_length: inputs of a row.
            attention: full or documents.
            precision: that the teacher is to have; None: any.

        Raises:
            ShearingError: it is not; says in what.
        """
        own = self.conditions
        found: dict[str, tuple[object, object]] = {
            "vocabulary": (own.vocab_size, vocab_size),
            "sequence length": (own.sequence_length, sequence_length),
            "attention": (own.attention, attention),
            "precision": (own.precision, precision or own.precision),
        }
        wrong = {name: pair for name, pair in found.items() if pair[0] != pair[1]}
        if own.teacher != teacher:
            wrong["teacher"] = (f"{self.name}, fingerprint {own.teacher}", f"{called}, fingerprint {teacher}")
        for domain, manifest in corpus.manifests.items():
            there, wanted = self.domains.get(domain), domain_fingerprint(manifest)
            if there is None:
                wrong[f"domain {domain}"] = ("not in it", "all that are trained on")
            elif there.fingerprint != wanted:
                wrong[f"text of {domain}"] = (f"fingerprint {there.fingerprint}", f"fingerprint {wanted}")
        if wrong:
            raise ShearingError(
                "cache",
                value=f"{self.path}: " + "; ".join(f"{name} {pair[0]}" for name, pair in wrong.items()),
                allowed="what this run reads: " + "; ".join(f"{name} {pair[1]}" for name, pair in wrong.items()),
                mend=f"write a cache for this run ({_WRITE} {corpus.path} --model {called} …), or set "
                f"{key('cache')}=null",
            )

    def row(self, domain: str, row: int) -> Said | None:
        """What the teacher says of a row; None where it was not asked.

        Raises:
            ShearingError: what is there is not what was written.
        """
        number = row // self.rows_per_piece
        if number not in self._numbers.get(domain, ()):
            return None
        piece = self._piece(domain, number)
        stored = piece.row(row)
        if stored is None:
            return None
        own = self.conditions
        try:
            return own.form.decoded(stored, positions=own.sequence_length, vocab_size=own.vocab_size)
        except ValueError as error:
            raise piece.damaged(row) from error

    def rows(self, domain: str) -> npt.NDArray[np.int64]:
        """The rows of a domain that are in it, ascending."""
        record = self.domains.get(domain)
        pieces = () if record is None else record.pieces
        found = [self._piece(domain, piece.number).rows for piece in pieces]
        return np.concatenate([np.empty(0, dtype=np.int64), *found])

    def num_rows(self, domain: str) -> int:
        """How many rows of a domain are in it."""
        return sum(piece.rows for piece in self.domains[domain].pieces) if domain in self.domains else 0

    @property
    def bytes(self) -> int:
        """Size of all pieces."""
        return sum(piece.bytes for record in self.domains.values() for piece in record.pieces)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(self.num_rows, self.domains)) * self.conditions.sequence_length

    def damages(self, *, advance: Advance = lambda _: None) -> Iterable[ShearingError]:
        """Reads every file; each one that is not what was written.

        Args:
            advance: called with the number of bytes just read.
        """
        for domain, record in self.domains.items():
            for piece in record.pieces:
                path = piece_path(self.path, domain=domain, number=piece.number)
                if sha256_of_file(path, advance=advance) != piece.sha256:
                    yield ShearingError(
                        str(path),
                        value="other bytes than were written",
                        allowed=f"SHA-256 {piece.sha256}",
                        mend=WRITE_AGAIN,
                    )

    def _require_whole(self) -> None:
        for domain, record in self.domains.items():
            for piece in record.pieces:
                path = piece_path(self.path, domain=domain, number=piece.number)
                mark = piece_mark(self.conditions, domain=domain, fingerprint=record.fingerprint, number=piece.number)
                if (damage := damage_of(path, mark=mark)) is not None:
                    raise damage
                if (found := path.stat().st_size) != piece.bytes:
                    raise ShearingError(
                        str(path),
                        value=f"{found} bytes",
                        allowed=f"{piece.bytes} bytes, as {INDEX_NAME} says",
                        mend=WRITE_AGAIN,
                    )
