"""Documents out of JSON: one object a line; or objects one after the other, over any number of lines, in arrays or not.

Which of the two a `.json` file is, its first line says. Memory holds one value and a megabyte of what follows it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO

from shearing.data.texts.bad_input import BadInput
from shearing.data.texts.documents import Text, TextFile
from shearing.data.texts.streams import READ_BYTES

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What is wrong this near to the end of what was read may be right when more is read: half of `-Infinity` or `\ud83d`.
_NEAR = 16
_SPACE = re.compile(r"[ \t\r\n]*")


def json_texts(file: BinaryIO, *, source: TextFile, bad: BadInput) -> Iterator[Text]:
    """All documents of a file of JSON, in order.

    Args:
        file: of JSON lines (`.jsonl`), or of lines or values (`.json`).
        source: what it is.
        bad: takes what cannot be read; of values, nothing behind it can be read either.

    Raises:
        ShearingError: bad input, unless it is to be skipped.
    """
    first = file.readline(bad.max_document_bytes + 1).removeprefix(BYTE_ORDER_MARK)
    if source.kind == "lines" or _is_a_line(first):
        yield from _lines(first, file, source=source, bad=bad)
    else:
        yield from _values(first, file, source=source, bad=bad)


def _is_a_line(first: bytes) -> bool:
    """Whether a file that begins so is of JSON lines: a broken one too, but for what goes on behind its end."""
    text = first.decode(errors="replace").strip()
    if not text or text.startswith("["):
        return False
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos < len(text) - 1 or error.msg.startswith("Unterminated")
    except (ValueError, RecursionError):
        pass
    return True


def _lines(first: bytes, file: BinaryIO, *, source: TextFile, bad: BadInput) -> Iterator[Text]:
    rest = iter(lambda: file.readline(bad.max_document_bytes + 1), b"")
    for number, line in enumerate(chain([first] if first else [], rest), start=1):
        place = f"{source.path}:{number}"
        if len(line) > bad.max_document_bytes and not line.endswith(b"\n"):
            while (dropped := file.readline(READ_BYTES)) and not dropped.endswith(b"\n"):
                pass
            bad.too_long(place=place)
        elif line.strip() and (text := _text_of_line(line, source=source, place=place, bad=bad)) is not None:
            yield Text(text, place)


def _text_of_line(line: bytes, *, source: TextFile, place: str, bad: BadInput) -> str | None:
    import orjson

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
            mend = "correct the line"
            bad.report("bad_json", place=place, value=str(error), allowed="one JSON object a line", mend=mend)
            return None
    return source.text_of(record, place=place, bad=bad)


def _values(first: bytes, file: BinaryIO, *, source: TextFile, bad: BadInput) -> Iterator[Text]:
    reader = _ValueReader(first, file, limit=bad.max_document_bytes)
    while True:
        place = source.path
        try:
            if not reader.find():
                return
            place = f"{source.path}:{reader.line}"
            record = reader.read()
        except UnicodeDecodeError as error:
            bad.not_utf8(error, place=f"{source.path}:{reader.line}")
            return
        except _TooLongError:
            bad.too_long(place=place)
            return
        except (ValueError, RecursionError) as error:
            mend = "correct it there: nothing behind it can be read"
            where = f"{source.path}:{reader.line_of(error)}"
            found = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            bad.report("bad_json", place=where, value=found, allowed="JSON objects, in an array or not", mend=mend)
            return
        text = source.text_of(record, place=place, bad=bad)
        if text is None:
            continue
        if len(text) > bad.max_document_bytes or len(text.encode()) > bad.max_document_bytes:
            bad.too_long(place=place)
        else:
            yield Text(text, place)


class _TooLongError(Exception):
    """A value goes on for longer than a document may."""


class _ValueReader:
    """Values of a stream of JSON one by one; those of an array count each by itself.

    Args:
        first: what was read of the file already.
        file: the rest.
        limit: characters that a value may have.
    """

    def __init__(self, first: bytes, file: BinaryIO, *, limit: int) -> None:
        self._file, self._limit = file, limit
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._first, self._text, self._at = first, "", 0
        self._in_array = self._ended = False
        self.line = 1

    def find(self) -> bool:
        """Go to the next value; false where the file ends.

        Raises:
            ValueError: an array is not closed, or UTF-8 is broken.
        """
        while True:
            self._pass(_SPACE.match(self._text, self._at).end())  # type: ignore[union-attr]
            if self._at == len(self._text):
                if not self._read_on(READ_BYTES):
                    if self._in_array:
                        raise ValueError("the array is not closed")
                    return False
                continue
            character = self._text[self._at]
            if character == "[" and not self._in_array:
                self._in_array = True
            elif character == "]" and self._in_array:
                self._in_array = False
            elif character != "," or not self._in_array:
                return True
            self._at += 1

    def read(self) -> object:
        """The value that `find` has found.

        Raises:
            ValueError, RecursionError: no JSON.
            _TooLongError: it is too long to be read.
        """
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _NEAR
                if not unfinished or self._ended:
                    raise
            else:
                # A number may go on.
                if end < len(self._text) or isinstance(value, (dict, list, str)) or self._ended:
                    self._pass(end)
                    return value
            if len(self._text) - self._at > self._limit:
                raise _TooLongError
            # Twice as much each time, or a long value would be read from its beginning a thousand times.
            self._read_on(max(READ_BYTES, len(self._text) - self._at))

    def line_of(self, error: Exception) -> int:
        """The line of an error that `read` has raised."""
        if isinstance(error, json.JSONDecodeError):
            return self.line + self._text.count("\n", self._at, error.pos)
        return self.line

    def _pass(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read_on(self, count: int) -> bool:
        data = self._first or self._file.read(count)
        self._first = b""
        self._ended = not data
        self._text = self._text[self._at :] + self._decoder.decode(data, final=self._ended)
        self._at = 0
        return not self._ended
