"""Texts out of the inputs of a preparation: files of any file system, and data sets of the hub.

datatrove's own readers log and go on where a line is broken, a file is cut off or a text is missing; ours do not.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data_tools.preparation.sources import Input, load_hub_dataset, open_file_system
from shearing.data.texts.bad_input import BadInput
from shearing.data.texts.chat import ChatTemplate
from shearing.data.texts.documents import Text
from shearing.data.texts.reading import read_texts
from shearing.data.texts.streams import READ_BYTES
from shearing.errors import ShearingError
from shearing.files.permissions import forbidden

if TYPE_CHECKING:
    from typing_extensions import Buffer

OTHERWISE = ", or leave such input out: bad_input=skip"
"""What to do about bad input beside mending it."""


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
        no_permission = None if "://" in source.path else forbidden(Path(source.path), error=error)
        raise no_permission or ShearingError(
            source.path, value=str(error), allowed="a file that can be read", mend="check that it is still there"
        ) from error


def texts_of(
    source: Input, stream: SourceStream | None, *, chat: ChatTemplate | None, separator: str | None, bad: BadInput
) -> Iterator[Text]:
    """All documents of an input, in order.

    Args:
        source: what is read.
        stream: its bytes; None for a data set of the hub.
        chat: renders messages; None: the field holds text.
        separator: divides text files; None: a file is one document.
        bad: takes what cannot be read.

    Raises:
        ShearingError: bad input, unless it is to be skipped.
    """
    if source.kind == "hub":
        yield from _hub_rows(source, chat=chat, bad=bad)
        return
    assert stream is not None
    yield from read_texts(source.file(chat=chat), stream, opened=lambda: _open(source), separator=separator, bad=bad)


def _hub_rows(source: Input, *, chat: ChatTemplate | None, bad: BadInput) -> Iterator[Text]:
    assert source.hub is not None
    piece, file = source.hub, source.file(chat=chat)
    rows: Any = load_hub_dataset(piece)
    if piece.streaming:
        rows = rows.shard(num_shards=piece.end, index=piece.start)
        first = 0
    else:
        rows = rows.select(range(piece.start, piece.end))
        first = piece.start
    for row, record in enumerate(rows, start=first):
        place = f"{source.path}, row {row}"
        text = file.text_of(record, place=place, bad=bad)
        if text is None:
            continue
        if len(text) > bad.max_document_bytes:
            bad.too_long(place=place)
        else:
            yield Text(text, place)
