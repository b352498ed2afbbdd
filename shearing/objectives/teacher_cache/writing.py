"""Writes a teacher cache: pieces on many processes, each whole or not at all, then the index.

A piece depends on its rows, the teacher, the micro-batch and those of its rows that were there before, which are kept,
not on who writes it: any number of processes, stopped and continued at any point, leave the same bytes.

    CACHE/cache.earlier.json    the index, while there is more in some pieces than it says

Shapes: B sequences of a micro-batch, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
    domains_of,
    index_of,
    piece_mark,
    piece_path,
    pieces_in,
    rows_of_spans,
    spans_of,
)
from shearing.objectives.teacher_cache.observer import Observer
from shearing.objectives.teacher_cache.pieces import Piece, damage_of, mark_of, write_piece
from shearing.processes.processes import Processes

PIECE_TOKENS = 1 << 18
"""Of a piece, about: what a kill loses, and what a file's own cost is shared by."""
_EARLIER = "cache.earlier.json"
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

    def written(self) -> Piece | None:
        """What there is of it, perhaps of fewer rows; None: nothing that is whole."""
        return None if damage_of(self.path, mark=self.mark) is not None else Piece.open(self.path)

    def unasked(self) -> Rows:
        """Its rows that have not been written."""
        written = self.written()
        return self.rows if written is None else np.setdiff1d(self.rows, written.rows)


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
        return [
            self.part(domain, int(number), rows=rows[rows // self.rows_per_piece == number])
            for domain, rows in self.rows.items()
            for number in np.unique(rows // self.rows_per_piece)
        ]

    def part(self, domain: str, number: int, *, rows: Rows) -> Part:
        """A piece of these rows."""
        fingerprint = domain_fingerprint(self.corpus.manifests[domain])
        return Part(
            domain=domain,
            number=number,
            rows=rows,
            path=piece_path(self.folder, domain=domain, number=number),
            mark=piece_mark(self.conditions, domain=domain, fingerprint=fingerprint, number=number),
        )


def rows_per_piece(sequence_length: int, *, piece_tokens: int) -> int:
    """R at a sequence length."""
    return max(1, piece_tokens // sequence_length)


def with_rows_there(plan: Plan) -> dict[str, Rows]:
    """Rows of each domain of a plan, and those asked for before: what was asked once stays.

    These are what pieces in the folder have, and what the index says of pieces that are gone or damaged.

    Raises:
        ShearingError: the folder holds a cache of something else; or rows are gone, and the index does not say which.
    """
    grown: dict[str, Rows] = {}
    index = _index(plan)
    for domain, rows in plan.rows.items():
        numbers = pieces_in(plan.folder, domain=domain)
        written = (plan.part(domain, number, rows=rows).written() for number in numbers)
        record = index.get(domain)
        # Of other text there is nothing to keep.
        of_text = record is not None and record.fingerprint == domain_fingerprint(plan.corpus.manifests[domain])
        recorded = record.pieces if record is not None and of_text else ()
        before = [*(rows_of_spans(piece.spans) for piece in recorded), *(each.rows for each in written if each)]
        grown[domain] = np.unique(np.concatenate([rows, *before]))
        for piece in recorded:
            gone = piece.rows - np.count_nonzero(grown[domain] // plan.rows_per_piece == piece.number)
            if gone > 0:
                raise ShearingError(
                    "output",
                    value=f"{piece_path(plan.folder, domain=domain, number=piece.number)}, without {gone} rows of "
                    f"{domain} that earlier commands asked for",
                    allowed="all rows that the cache had; its index is of a time when it did not say which they were",
                    mend=f"ask for all rows of {domain}: without --rows and --recipe",
                )
    return grown


def missing_parts(plan: Plan) -> list[Part]:
    """The pieces that are still to be written.

    Args:
        plan: see `with_rows_there`, whose rows it has.

    Raises:
        ShearingError: the folder holds pieces of something else.
    """
    missing = []
    for part in plan.parts():
        if part.path.is_file() and (found := mark_of(part.path)) not in (None, part.mark):
            raise _of_another(part.path, found=f"{found}", wanted=part.mark)
        if len(part.unasked()):
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
        plan: what is to be there, with the rows that are there already.
        missing: of it, see `missing_parts`; the same on all processes.
        teacher: loads the model, which attends as the plan's conditions say; not called where nothing is missing.
        micro_batch_size: rows that it reads at a time.
        processes: those that share the work.
        advance: called with the number of tokens that this process has just done.

    Raises:
        ShearingError: see `teacher`.
        OSError, SafetensorError: a file cannot be written; see `files.full_disk`.
    """
    others = processes.on_main(lambda: _left_by_another(plan))
    if missing:
        # What the index says would not be so any more.
        processes.on_main(lambda: _set_index_aside(plan.folder))
        own = missing[processes.rank :: processes.size]
        processes.together(
            lambda: _write_parts(plan, own, teacher=teacher, micro_batch_size=micro_batch_size, advance=advance)
        )
    parts = plan.parts() + others
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
        written = part.written()
        stored = {} if written is None else written.stored()
        unasked = part.unasked().tolist()
        for start in range(0, len(unasked), micro_batch_size):
            rows = unasked[start : start + micro_batch_size]
            stored |= zip(rows, _asked(plan, observer, part.domain, rows), strict=True)
            advance(len(rows) * conditions.sequence_length)
        write_piece(part.path, part.rows, [stored[row] for row in part.rows.tolist()], mark=part.mark)


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
        spans=spans_of(part.rows),
    )


def _left_by_another(plan: Plan) -> list[Part]:
    """Pieces of domains that the plan has not, where a call was interrupted that may have changed them."""
    if (plan.folder / INDEX_NAME).is_file():
        return []
    found = []
    for domain, record in _index(plan).items():
        for number in () if domain in plan.rows else pieces_in(plan.folder, domain=domain):
            mark = piece_mark(plan.conditions, domain=domain, fingerprint=record.fingerprint, number=number)
            path = piece_path(plan.folder, domain=domain, number=number)
            part = Part(domain=domain, number=number, rows=np.empty(0, dtype=np.int64), path=path, mark=mark)
            # One that is lost stays in the index as it was, so that the cache says so.
            if (written := part.written()) is not None:
                found.append(replace(part, rows=np.array(written.rows)))
    return found


def _write_index(plan: Plan, parts: list[Part], records: Mapping[int, PieceRecord]) -> None:
    own = {
        domain: DomainRecord(fingerprint=domain_fingerprint(plan.corpus.manifests[domain]), pieces=[])
        for domain in plan.rows
    }
    of_domain = {**_index(plan), **own}
    pieces = {domain: {piece.number: piece for piece in record.pieces} for domain, record in of_domain.items()}
    for index, part in enumerate(parts):
        pieces[part.domain][part.number] = records[index]
    domains = {
        domain: replace(of_domain[domain], pieces=[piece for _, piece in sorted(pieces[domain].items())])
        for domain in sorted(of_domain)
    }
    content = index_of(plan.conditions, name=plan.name, rows_per_piece=plan.rows_per_piece, domains=domains)
    write_json(plan.folder / INDEX_NAME, content)
    (plan.folder / _EARLIER).unlink(missing_ok=True)


def _index(plan: Plan) -> dict[str, DomainRecord]:
    """Domains of the cache in the folder, as its index has them or had them before pieces were written.

    Raises:
        ShearingError: it is a cache of something else.
    """
    there = (plan.folder / name for name in (INDEX_NAME, _EARLIER) if (plan.folder / name).is_file())
    if (index := next(map(read_json, there), None)) is None:
        return {}
    own = {"conditions": plan.conditions.to_json(), "rows_per_piece": plan.rows_per_piece}
    if (found := {name: index.get(name) for name in own}) != own:
        raise _of_another(plan.folder, found=f"{found}", wanted=f"{own}")
    return domains_of(index)


def _set_index_aside(folder: Path) -> None:
    """It says which domains there are that this plan has not."""
    if (folder / INDEX_NAME).is_file():
        (folder / INDEX_NAME).replace(folder / _EARLIER)
        flush_folder(folder)


def _of_another(path: Path, *, found: str, wanted: str) -> ShearingError:
    return ShearingError(
        "output",
        value=f"{path}, of another cache: {found}",
        allowed=f"a new folder, or a cache that is continued: {wanted}",
        mend="choose another output, or remove that folder",
    )
