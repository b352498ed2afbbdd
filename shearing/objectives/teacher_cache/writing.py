"""Writes a teacher cache: pieces on many processes, each whole or not at all, then the index.

A piece depends on its rows, the teacher and the micro-batch alone, not on who writes it nor on what was there before:
any number of processes, stopped and continued at any point, leave the same bytes.

Shapes: B sequences of a micro-batch, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from shearing.data.corpus.corpus import Corpus
from shearing.data.documents import DocumentRules, Inputs, sent
from shearing.errors import ShearingError
from shearing.files.checksums import sha256_of_file
from shearing.files.durable import flush_folder, read_json, write_json
from shearing.objectives.teacher_cache.cache import (
    INDEX_NAME,
    Conditions,
    DomainRecord,
    PieceRecord,
    domain_fingerprint,
    index_of,
    piece_mark,
    piece_path,
)
from shearing.objectives.teacher_cache.observer import Observer
from shearing.objectives.teacher_cache.pieces import Piece, damage_of, mark_of, write_piece
from shearing.processes.processes import Processes

PIECE_TOKENS = 1 << 18
"""Of a piece, about: what a kill loses, and what a file's own cost is shared by."""
_CHUNK_TOKENS = 512

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece that is to be there.

    Attributes:
        domain, number: which.
        rows: of the domain, ascending.
        path: its file.
        mark: see `piece_mark`.
    """

    domain: str
    number: int
    rows: Rows
    path: Path
    mark: str

    def is_there(self) -> bool:
        """Whether it has been written, of these rows."""
        if damage_of(self.path, mark=self.mark) is not None:
            return False
        return np.array_equal(Piece.open(self.path).rows, self.rows)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be written.

    Attributes:
        folder: of the cache.
        corpus: whose training rows the teacher is asked of.
        conditions: see `Conditions`.
        name: of the teacher, for people.
        rows: of each domain, ascending.
        rows_per_piece: R.
    """

    folder: Path
    corpus: Corpus
    conditions: Conditions
    name: str
    rows: Mapping[str, Rows]
    rows_per_piece: int

    def parts(self) -> list[Part]:
        """All pieces, in order."""
        return [part for domain in self.rows for part in self._of_domain(domain)]

    def _of_domain(self, domain: str) -> Iterator[Part]:
        rows = self.rows[domain]
        fingerprint = domain_fingerprint(self.corpus.manifests[domain])
        for number in np.unique(rows // self.rows_per_piece).tolist():
            yield Part(
                domain=domain,
                number=number,
                rows=rows[rows // self.rows_per_piece == number],
                path=piece_path(self.folder, domain=domain, number=number),
                mark=piece_mark(self.conditions, domain=domain, fingerprint=fingerprint, number=number),
            )


def rows_per_piece(sequence_length: int, *, piece_tokens: int) -> int:
    """R at a sequence length."""
    return max(1, piece_tokens // sequence_length)


def missing_parts(plan: Plan) -> list[Part]:
    """The pieces that are still to be written.

    Raises:
        ShearingError: the folder holds a cache of something else.
    """
    index = plan.folder / INDEX_NAME
    if index.is_file():
        found = read_json(index).get("conditions")
        if found != plan.conditions.to_json():
            raise _of_another(plan.folder, found=f"{found}", wanted=f"{plan.conditions.to_json()}")
    missing = []
    for part in plan.parts():
        if part.path.is_file() and (found := mark_of(part.path)) not in (None, part.mark):
            raise _of_another(part.path, found=f"{found}", wanted=part.mark)
        if not part.is_there():
            missing.append(part)
    return missing


def write_cache(
    plan: Plan,
    *,
    missing: list[Part],
    teacher: Callable[[], PreTrainedModel],
    micro_batch_size: int,
    processes: Processes,
    advance: Callable[[int], None],
) -> None:
    """Write the pieces that are missing, and the index; all processes call it together.

    Args:
        plan: what is to be there.
        missing: of it, see `missing_parts`; the same on all processes.
        teacher: loads the model, which attends as the plan's conditions say; not called where nothing is missing.
        micro_batch_size: rows that it reads at a time.
        processes: those that share the work.
        advance: called with the number of tokens that this process has just done.

    Raises:
        ShearingError: see `teacher`.
        OSError, SafetensorError: a file cannot be written; see `files.full_disk`.
    """
    if missing:
        # What the index says would not be so any more.
        processes.on_main(lambda: _remove_index(plan.folder))
        own = missing[processes.rank :: processes.size]
        processes.together(
            lambda: _write_parts(plan, own, teacher=teacher, micro_batch_size=micro_batch_size, advance=advance)
        )
    parts = plan.parts()
    records = processes.together(lambda: {index: _record(parts[index]) for index in _share(len(parts), processes)})
    processes.on_main(lambda: _write_index(plan, parts, {k: v for of_rank in records for k, v in of_rank.items()}))


def _share(count: int, processes: Processes) -> range:
    return range(processes.rank, count, processes.size)


def _write_parts(
    plan: Plan,
    parts: list[Part],
    *,
    teacher: Callable[[], PreTrainedModel],
    micro_batch_size: int,
    advance: Callable[[int], None],
) -> None:
    if not parts:
        return
    conditions = plan.conditions
    observer = Observer(teacher(), form=conditions.form, chunk_tokens=_CHUNK_TOKENS)
    for part in parts:
        part.path.parent.mkdir(parents=True, exist_ok=True)
        stored: list[bytes] = []
        for start in range(0, len(part.rows), micro_batch_size):
            stored += _asked(plan, observer, part.domain, part.rows[start : start + micro_batch_size].tolist())
            advance(min(micro_batch_size, len(part.rows) - start) * conditions.sequence_length)
        write_piece(part.path, part.rows, stored, mark=part.mark)


def _asked(plan: Plan, observer: Observer, domain: str, rows: list[int]) -> list[bytes]:
    """What the teacher says of some rows of a domain, as it is stored."""
    conditions, corpus = plan.conditions, plan.corpus
    length, device = conditions.sequence_length, observer.model.device
    rules = DocumentRules(attention_within=conditions.attention == "documents")
    places = [(domain, row) for row in rows]
    tokens_BT = sent(torch.from_numpy(corpus.rows(places, sequence_length=length)), device=device)
    positions_BT = None
    if rules.needs_positions:
        positions_BT = torch.from_numpy(
            np.stack([corpus.row_positions(*place, sequence_length=length) for place in places])
        )
    inputs = Inputs(tokens_BT[:, :-1], rules.documents(positions_BT, device=device))
    said = observer.said(inputs, following_BS=tokens_BT[:, 1:], places=places)
    return [conditions.form.encoded(each, vocab_size=conditions.vocab_size) for each in said]


def _record(part: Part) -> PieceRecord:
    return PieceRecord(
        number=part.number,
        rows=len(part.rows),
        bytes=part.path.stat().st_size,
        sha256=sha256_of_file(part.path),
    )


def _write_index(plan: Plan, parts: list[Part], records: Mapping[int, PieceRecord]) -> None:
    of_domain: dict[str, list[PieceRecord]] = {domain: [] for domain in plan.rows}
    for index, part in enumerate(parts):
        of_domain[part.domain].append(records[index])
    domains = {
        domain: DomainRecord(fingerprint=domain_fingerprint(plan.corpus.manifests[domain]), pieces=pieces)
        for domain, pieces in of_domain.items()
    }
    content = index_of(plan.conditions, name=plan.name, rows_per_piece=plan.rows_per_piece, domains=domains)
    write_json(plan.folder / INDEX_NAME, content)


def _remove_index(folder: Path) -> None:
    if (folder / INDEX_NAME).is_file():
        (folder / INDEX_NAME).unlink()
        flush_folder(folder)


def _of_another(path: Path, *, found: str, wanted: str) -> ShearingError:
    return ShearingError(
        "output",
        value=f"{path}, of another cache: {found}",
        allowed=f"a new folder, or a cache that is continued: {wanted}",
        mend="choose another output, or remove that folder",
    )
