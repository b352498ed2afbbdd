"""Texts out of files, with the place of each; what cannot be read is an error with its place, or counted.

datatrove's own readers log and go on where a line is broken, a file is cut off or a text is missing; these do not.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import orjson

from data_tools.preparation.sources import Input, load_hub_dataset, open_file_system
from shearing.errors import ShearingError

if TYPE_CHECKING:
    from typing_extensions import Buffer


READ_BYTES = 1 << 20
ROWS_PER_BATCH = 256
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Text(NamedTuple):
    """A document's text and its place: `file:line`, or `file, row 7`."""

    text: str
    place: str


@dataclass
class BadInput:
    """What to do with what cannot be read, and how much of it there was.

    Args:
        policy: stop: raise; skip: count.
        max_document_bytes: longer documents count as bad.
        left_out: documents not taken, by reason; a file that ends too early counts as one.
    """

    policy: Literal["stop", "skip"]
    max_document_bytes: int
    left_out: Counter[str] = field(default_factory=Counter)

    def report(self, reason: str, *, place: str, value: str, allowed: str, mend: str) -> None:
        """Raise or count, by the policy.

        Raises:
            ShearingError: the policy is to stop.
        """
        if self.policy == "stop":
            raise ShearingError(
                place, value=value, allowed=allowed, mend=f"{mend}, or leave such input out: bad_input=skip"
            )
        self.left_out[reason] += 1

    def too_long(self, *, place: str) -> None:
        self.report(
            "too_long",
            place=place,
            value=f"more than {self.max_document_bytes} bytes",
            allowed=f"documents of at most {self.max_document_bytes} bytes",
            mend="divide the document, or raise max_document_bytes",
        )

    def not_utf8(self, error: UnicodeDecodeError, *, place: str) -> None:
        self.report(
            "not_utf8",
            place=place,
            value=f"byte {error.object[error.start]:#04x} at offset {error.start}",
            allowed="UTF-8 text",
            mend="convert it to UTF-8",
        )

    def no_text(self, *, place: str, text_field: str, found: str) -> None:
        self.report(
            "no_text",
            place=place,
            value=found,
            allowed=f"text in the field {text_field!r}",
            mend="name the field that holds the text: text_field",
        )

    def damaged(self, error: Exception, *, place: str) -> None:
        self.report(
            "damaged",
            place=place,
            value=str(error) or type(error).__name__,
            allowed="a whole file",
            mend="it is cut off or damaged: fetch it again",
        )


class SourceStream(io.RawIOBase):
    """A file read once from its beginning, which counts and hashes what passes.

    Args:
        file: open for reading bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._digest = hashlib.sha256()
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        data = self._file.read(min(len(view), READ_BYTES))
        view[: len(data)] = data
        self._digest.update(data)
        self.position += len(data)
        return len(data)

    def checksum(self) -> str:
        """SHA-256 of the whole file; reads what is left of it."""
        while data := self._file.read(READ_BYTES):
            self._digest.update(data)
            self.position += len(data)
        return f"sha256:{self._digest.hexdigest()}"

    def release(self) -> None:
        """Close the file; `close` does not, as what is stacked on a stream calls it before the rest is hashed."""
        self._file.close()


def open_source(source: Input) -> SourceStream:
    """The bytes of an input as they lie there.

    Raises:
        ShearingError: it cannot be opened.
    """
    return SourceStream(_open(source))


def _open(source: Input) -> BinaryIO:
    try:
        if "://" in source.path:
            file_system, inside = open_file_system(source.path)
            file: BinaryIO = file_system.open(inside, "rb")
            return file
        return Path(source.path).open("rb")
    except OSError as error:
        raise ShearingError(
            source.path, value=str(error), allowed="a file that can be read", mend="check that it is still there"
        ) from error


def read_texts(source: Input, stream: SourceStream | None, *, separator: str | None, bad: BadInput) -> Iterator[Text]:
    """All documents of an input, in order.

    Args:
        source: what is read.
        stream: its bytes; None for a data set of the hub.
        separator: divides text files; None: a file is one document.
        bad: takes what cannot be read.

    Raises:
        ShearingError: bad input, unless it is to be skipped.
    """
    if source.kind == "hub":
        yield from _hub_rows(source, bad=bad)
        return
    assert stream is not None
    if source.kind == "parquet":
        yield from _parquet_rows(source, bad=bad)
        return
    try:
        with contextlib.closing(_decompressed(stream, source=source)) as file:
            if source.kind == "lines":
                yield from _json_lines(file, source=source, bad=bad)
            elif source.kind == "text":
                yield from _plain_texts(file, source=source, separator=separator, bad=bad)
            else:
                yield from _arrow_rows(file, source=source, bad=bad)
    except (EOFError, zlib.error, gzip.BadGzipFile, _TruncatedError) as error:
        bad.damaged(error, place=source.path)


def _decompressed(stream: SourceStream, *, source: Input) -> BinaryIO:
    buffered = io.BufferedReader(stream, READ_BYTES)
    if source.compression == "gzip":
        return gzip.GzipFile(fileobj=buffered)  # type: ignore[return-value]
    if source.compression == "zstd":
        return io.BufferedReader(_ZstdStream(buffered), READ_BYTES)
    return buffered


class _TruncatedError(Exception):
    """The compressed data ends inside a frame, or is none."""


class _ZstdStream(io.RawIOBase):
    """Frames of zstd one after the other; unlike zstandard's own reader it notices an end inside a frame."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        super().__init__()
        self._file = file
        self._new = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._frame: Any = None
        self._error = zstandard.ZstdError
        self._ready = memoryview(b"")
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        while not self._ready:
            if not self._input:
                self._input = self._file.read(1 << 16)
                if not self._input:
                    if self._frame is not None:
                        raise _TruncatedError("the compressed data ends too early")
                    return 0
            if self._frame is None:
                self._frame = self._new()
            try:
                self._ready = memoryview(self._frame.decompress(self._input))
            except self._error as error:
                raise _TruncatedError(str(error)) from error
            self._input = b""
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = None
        view = memoryview(buffer)
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _json_lines(file: BinaryIO, *, source: Input, bad: BadInput) -> Iterator[Text]:
    number = 0
    while line := file.readline(bad.max_document_bytes + 1):
        number += 1
        place = f"{source.path}:{number}"
        line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if len(line) > bad.max_document_bytes and not line.endswith(b"\n"):
            while (rest := file.readline(READ_BYTES)) and not rest.endswith(b"\n"):
                pass
            bad.too_long(place=place)
        elif line.strip() and (text := _json_text(line, source=source, place=place, bad=bad)) is not None:
            yield Text(text, place)


def _json_text(line: bytes, *, source: Input, place: str, bad: BadInput) -> str | None:
    try:
        record = orjson.loads(line)
    except ValueError:
        # Python's own reader also takes NaN and halves of surrogate pairs, which Python's own writer makes.
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            bad.not_utf8(error, place=place)
            return None
        except (ValueError, RecursionError) as error:
            bad.report(
                "bad_json", place=place, value=str(error), allowed="one JSON object a line", mend="correct the line"
            )
            return None
        if isinstance(record, dict) and isinstance(text := record.get(source.text_field), str):
            return text.encode(errors="replace").decode()  # no tokenizer takes half of a surrogate pair
    if isinstance(record, dict) and isinstance(text := record.get(source.text_field), str):
        return text
    if not isinstance(record, dict):
        found = f"a {type(record).__name__} and no object"
    elif source.text_field in record:
        found = f"{type(record[source.text_field]).__name__} in the field {source.text_field!r}"
    else:
        found = f"fields {', '.join(map(repr, record))}"
    bad.no_text(place=place, text_field=source.text_field, found=found)
    return None


def _plain_texts(file: BinaryIO, *, source: Input, separator: str | None, bad: BadInput) -> Iterator[Text]:
    line = 1
    for piece in _pieces(file, separator=separator.encode() if separator else None, limit=bad.max_document_bytes):
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
class _Piece:
    """Bytes between two separators, None if they are too many; and the line breaks in there and in the separator."""

    whole: bytes | None
    lines: int


def _pieces(file: BinaryIO, *, separator: bytes | None, limit: int) -> Iterator[_Piece]:
    """Divide a file; memory holds at most one document of the allowed length."""
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
            yield _Piece(None if dropped or len(whole) > limit else whole, lines)
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
            yield _Piece(None if dropped or len(buffer) > limit else bytes(buffer), 0)
            return
        buffer += chunk


def _parquet_rows(source: Input, *, bad: BadInput) -> Iterator[Text]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    with contextlib.closing(_open(source)) as stream:
        try:
            with pq.ParquetFile(stream, pre_buffer=False) as file:
                if source.text_field not in file.schema_arrow.names:
                    found = f"fields {', '.join(map(repr, file.schema_arrow.names))}"
                    bad.no_text(place=source.path, text_field=source.text_field, found=found)
                    return
                for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=[source.text_field]):
                    yield from _column_texts(batch.column(0), source=source, first_row=row, bad=bad)
                    row += len(batch)
        except (pa.ArrowInvalid, OSError) as error:
            bad.damaged(error, place=f"{source.path}, row {row}")


def _arrow_rows(file: BinaryIO, *, source: Input, bad: BadInput) -> Iterator[Text]:
    import pyarrow as pa

    row = 0
    try:
        with pa.ipc.open_stream(file) as batches:
            if source.text_field not in batches.schema.names:
                found = f"fields {', '.join(map(repr, batches.schema.names))}"
                bad.no_text(place=source.path, text_field=source.text_field, found=found)
                return
            for batch in batches:
                column = batch.column(batch.schema.get_field_index(source.text_field))
                yield from _column_texts(column, source=source, first_row=row, bad=bad)
                row += len(batch)
    except (pa.ArrowInvalid, OSError) as error:
        bad.damaged(error, place=f"{source.path}, row {row}")


def _column_texts(column: Any, *, source: Input, first_row: int, bad: BadInput) -> Iterator[Text]:
    """Texts of one column of a batch; rows count from 0."""
    import pyarrow as pa

    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        place = f"{source.path}, rows {first_row} to {first_row + len(column) - 1}"
        for _ in range(len(column)):
            found = f"{column.type} in the field {source.text_field!r}"
            bad.no_text(place=place, text_field=source.text_field, found=found)
        return
    # As bytes: Arrow does not check on its own that strings are UTF-8.
    for row, value in enumerate(column.cast(pa.large_binary()).to_pylist(), start=first_row):
        place = f"{source.path}, row {row}"
        if value is None:
            bad.no_text(place=place, text_field=source.text_field, found=f"null in the field {source.text_field!r}")
        elif len(value) > bad.max_document_bytes:
            bad.too_long(place=place)
        else:
            try:
                yield Text(value.decode(), place)
            except UnicodeDecodeError as error:
                bad.not_utf8(error, place=place)


def _hub_rows(source: Input, *, bad: BadInput) -> Iterator[Text]:
    assert source.hub is not None
    piece = source.hub
    rows: Any = load_hub_dataset(piece)
    if piece.streaming:
        rows = rows.shard(num_shards=piece.end, index=piece.start)
        first = 0
    else:
        rows = rows.select(range(piece.start, piece.end))
        first = piece.start
    for row, record in enumerate(rows, start=first):
        place = f"{source.path}, row {row}"
        text = record.get(source.text_field)
        if not isinstance(text, str):
            found = f"{type(text).__name__} in the field {source.text_field!r}"
            bad.no_text(place=place, text_field=source.text_field, found=found)
        elif len(text) > bad.max_document_bytes:
            bad.too_long(place=place)
        else:
            yield Text(text, place)
