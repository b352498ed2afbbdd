"""Documents out of plain text: a file is one, or what a separator divides it into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from shearing.data.texts.bad_input import BadInput
from shearing.data.texts.documents import Text, TextFile
from shearing.data.texts.json_texts import BYTE_ORDER_MARK
from shearing.data.texts.streams import READ_BYTES


def plain_texts(file: BinaryIO, *, source: TextFile, separator: str | None, bad: BadInput) -> Iterator[Text]:
    """All documents of a file of text, in order.

    Args:
        file: what is read.
        source: what it is.
        separator: divides it; None: it is one document.
        bad: takes what cannot be read.

    Raises:
        ShearingError: bad input, unless it is to be skipped.
    """
    line = 1
    for piece in pieces(file, separator=separator.encode() if separator else None, limit=bad.max_document_bytes):
        place = f"{source.path}:{line}"
        if piece.whole is None:
            bad.too_long(place=place)
        else:
            try:
                yield Text(piece.whole.decode(), place)
            except UnicodeDecodeError as error:
                before = piece.whole[: error.start].count(b"\n")
                bad.not_utf8(error, place=f"{source.path}:{line + before}")
        line += piece.lines


@dataclass(frozen=True)
class Piece:
    """Bytes between two separators, None if they are too many; and the line breaks in there and in the separator."""

    whole: bytes | None
    lines: int


def pieces(file: BinaryIO, *, separator: bytes | None, limit: int) -> Iterator[Piece]:
    """Divide a file; memory holds at most one document of the allowed length, `limit` bytes."""
    buffer = bytearray(file.read(READ_BYTES))
    if buffer.startswith(BYTE_ORDER_MARK):
        del buffer[: len(BYTE_ORDER_MARK)]
    dropped_lines, dropped, searched = 0, False, 0
    while True:
        end = buffer.find(separator, searched) if separator else -1
        if end >= 0:
            assert separator is not None
            whole = bytes(buffer[:end])
            lines = dropped_lines + whole.count(b"\n") + separator.count(b"\n")
            yield Piece(None if dropped or len(whole) > limit else whole, lines)
            del buffer[: end + len(separator)]
            dropped_lines, dropped, searched = 0, False, 0
            continue
        overlap = len(separator) - 1 if separator else 0
        if len(buffer) > limit + overlap:
            cut = len(buffer) - overlap
            dropped_lines += buffer.count(b"\n", 0, cut)
            del buffer[:cut]
            dropped = True
        searched = max(0, len(buffer) - overlap)
        chunk = file.read(READ_BYTES)
        if not chunk:
            yield Piece(None if dropped or len(buffer) > limit else bytes(buffer), 0)
            return
        buffer += chunk
