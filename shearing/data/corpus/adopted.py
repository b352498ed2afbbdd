"""Tokens that lie in files of somebody else's format and stay there: a part is a list of ranges of those files.

    CORPUS/DOMAIN/adopted.json         the files, and where a document's separator comes from
    CORPUS/DOMAIN/train_ranges.npy     int64 [3, ranges]: where each range ends in the part, its file, its first token
    CORPUS/DOMAIN/validation_ranges.npy, test_ranges.npy

take the place of `train.bin`, `validation.bin` and `test.bin`; everything else is as in a prepared domain. In whatever
format, tokens of a document lie one after the other in a file, as integers of one type: that is all that a range needs
to know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from shearing.data.corpus.format import made_again
from shearing.data.corpus.tokens import Ids
from shearing.errors import ShearingError
from shearing.files.durable import write_json
from shearing.files.mapped_arrays import ReadAhead, map_array, map_file
from shearing.files.permissions import forbidden

ADOPTED_NAME = "adopted.json"

Separators = Literal["present", "appended", "inside"]
"""present: documents end in the separator; appended: the reader adds it; inside: rows of a stream, cut anywhere."""


@dataclass(frozen=True)
class AdoptedFile:
    """A file with tokens: integers of `dtype` from its first byte on, as far as ranges are concerned."""

    path: str
    dtype: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Adopted:
    """What `adopted.json` says."""

    format: str
    separators: Separators
    files: tuple[AdoptedFile, ...]

    @classmethod
    def read(cls, folder: Path) -> Adopted | None:
        """Read `folder/adopted.json`; None for a domain whose tokens are its own.

        Raises:
            ShearingError: it is unreadable.
        """
        path = folder / ADOPTED_NAME
        try:
            values = json.loads(path.read_text())
            return cls(**{**values, "files": tuple(AdoptedFile(**file) for file in values["files"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise forbidden(path, error=error) or ShearingError(
                str(path), value=str(error), allowed="the index of an adopted domain", mend=made_again(folder)
            ) from error

    def write(self, folder: Path) -> None:
        """Write `folder/adopted.json`."""
        write_json(folder / ADOPTED_NAME, asdict(self))


def ranges_path(folder: Path, part: str) -> Path:
    """The file that says where the tokens of a part lie."""
    return folder / f"{part}_ranges.npy"


class AdoptedTokens:
    """A part of an adopted domain; finding a token takes O(log ranges), and nothing but the ranges met is read.

    Args:
        ranges: int64 [3, R], as in the file.
        files: mapped tokens of every file.
        separator_id: token that follows every range and lies in no file; None: ranges hold all there is.
        dtype: of the tokens returned.
    """

    def __init__(
        self, ranges: npt.NDArray[np.int64], *, files: Sequence[Ids], separator_id: int | None, dtype: str
    ) -> None:
        self._ends, self._file_ids, self._firsts = ranges
        self._files = files
        self._read_ahead = [ReadAhead(file) for file in files]
        self._separator_id = separator_id
        self._dtype = np.dtype(dtype)

    @classmethod
    def open(cls, folder: Path, *, part: str, adopted: Adopted, separator_id: int, dtype: str) -> AdoptedTokens:
        """The part of the domain in `folder`.

        Raises:
            OSError: a file cannot be opened.
        """
        return cls(
            map_array(ranges_path(folder, part)),
            files=[map_file(Path(file.path), dtype=file.dtype) for file in adopted.files],
            separator_id=separator_id if adopted.separators == "appended" else None,
            dtype=dtype,
        )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> Ids:
        tokens = np.empty(max(0, min(stop, len(self)) - start), dtype=self._dtype)
        for position, file, first, count, closed in self._pieces(start, stop):
            begin = position - start
            tokens[begin : begin + count] = self._files[file][first : first + count]
            if closed:
                tokens[begin + count] = self._separator_id
        return tokens

    def expect(self, start: int, stop: int) -> None:
        for _, file, first, count, _ in self._pieces(start, stop):
            self._read_ahead[file](first, first + count)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int, bool]]:
        """Of each range met: position in the part, file, first token there, tokens, whether a separator is added."""
        stop = min(stop, len(self))
        index = int(np.searchsorted(self._ends, start, side="right"))
        position = start
        while position < stop:
            begin, end = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
            last = min(end, stop)
            closed = self._separator_id is not None and last == end
            first = int(self._firsts[index]) + position - begin
            yield position, int(self._file_ids[index]), first, last - closed - position, closed
            position = last
            index += 1
