"""The tokens of one split of one domain, one after the other, wherever they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shearing.files.mapped_arrays import ReadAhead, map_file

Ids = npt.NDArray[np.integer[Any]]


class Tokens(Protocol):
    """What a corpus reads a split through; safe in any number of threads."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Ids:
        """Tokens [start, stop), cut off at the split's end; an array of any integer type, not to be written to."""
        ...

    def expect(self, start: int, stop: int) -> None:
        """Say that tokens [start, stop) will be read soon."""
        ...


class FlatTokens:
    """A file that holds nothing else: `train.bin` of a prepared domain, or that of another part.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, dtype: str) -> None:
        self._tokens: Ids = map_file(path, dtype=dtype)
        self._read_ahead = ReadAhead(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, stop: int) -> Ids:
        return self._tokens[start:stop]

    def expect(self, start: int, stop: int) -> None:
        self._read_ahead(start, stop)


class PieceOfTokens:
    """Tokens [first, first + length) of others."""

    def __init__(self, whole: Tokens, *, first: int, length: int) -> None:
        self._whole, self._first, self._length = whole, first, length

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> Ids:
        return self._whole.read(self._first + start, self._first + min(stop, self._length))

    def expect(self, start: int, stop: int) -> None:
        self._whole.expect(self._first + start, self._first + min(stop, self._length))
