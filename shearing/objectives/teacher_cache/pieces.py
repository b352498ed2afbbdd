"""A piece of a cache: one file with the rows of a stretch of a domain, written whole or not at all.

A safetensors file: `rows` (int64, ascending), `ends` (int64, where the bytes of each row end), `checks` (int64, CRC-32
of these bytes), `bytes` (uint8). Its only metadata says which piece it is, so files that were exchanged are told apart.
Every row is checked when it is read: to read all of a cache at a start would take longer than to read what is needed.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Self

from shearing.errors import ShearingError
from shearing.files.mapped_arrays import map_file
from shearing.files.tensors import read_header, write_tensors

_PIECE = "piece"
_DTYPES = {"I64": np.int64, "U8": np.uint8}
WRITE_AGAIN = (
    "remove the file, if it is there, and repeat shear data teacher for this domain (--rows 1 is enough): all rows "
    "that the file had are asked for again"
)
"""Mends a piece that is lost: the index says which rows it had."""


def write_piece(path: Path, rows: npt.NDArray[np.int64], stored: Sequence[bytes], *, mark: str) -> None:
    """Write a piece, flushed to disk and renamed into its place.

    Args:
        path: file to write; its folder exists.
        rows: of the domain, ascending.
        stored: bytes of each.
        mark: says which piece of which cache it is.

    Raises:
        OSError, SafetensorError: see `write_tensors`.
    """
    joined = np.frombuffer(bytearray(b"".join(stored)), dtype=np.uint8)
    arrays = {
        "rows": rows,
        "ends": np.cumsum([len(each) for each in stored]),
        "checks": np.array([zlib.crc32(each) for each in stored]),
    }
    tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    write_tensors(path, {**tensors, "bytes": torch.from_numpy(joined)}, metadata={_PIECE: mark})


def mark_of(path: Path) -> str | None:
    """Which piece of which cache a file is; None where it is none, or not whole."""
    try:
        return read_header(path)[1].get(_PIECE)
    except ShearingError:
        return None


def damage_of(path: Path, *, mark: str) -> ShearingError | None:
    """What is wrong with a piece that can be told without reading its rows; None: nothing."""
    if not path.is_file():
        return ShearingError(str(path), value="missing", allowed="all files of the cache", mend=WRITE_AGAIN)
    try:
        entries, metadata = read_header(path)
    except ShearingError as error:
        return ShearingError(str(path), value=error.value, allowed="a whole file of the cache", mend=WRITE_AGAIN)
    if metadata.get(_PIECE) != mark or set(entries) != {"rows", "ends", "checks", "bytes"}:
        return ShearingError(
            str(path),
            value=f"{metadata.get(_PIECE)}",
            allowed=f"{mark}: this piece of this cache",
            mend="files were exchanged: put them back, or remove them and repeat shear data teacher for their domains "
            "(--rows 1 is enough): all rows that they had are asked for again",
        )
    return None


class Piece:
    """A piece, memory-mapped.

    Args:
        rows, ends, checks, stored: its arrays.
        path: for errors.
    """

    def __init__(
        self,
        rows: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
        checks: npt.NDArray[np.int64],
        stored: npt.NDArray[np.uint8],
        *,
        path: Path,
    ) -> None:
        self.rows = rows
        self._ends, self._checks, self._stored, self._path = ends, checks, stored, path

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a piece that has no `damage_of`.

        Raises:
            ShearingError: it is not whole.
        """
        entries, _ = read_header(path)
        content = map_file(path, dtype=np.uint8)

        def array(name: str) -> npt.NDArray[Any]:
            entry = entries[name]
            return content[entry.begin : entry.end].view(_DTYPES[entry.dtype])

        return cls(array("rows"), array("ends"), array("checks"), array("bytes"), path=path)

    def row(self, row: int) -> bytes | None:
        """The bytes of a row of the domain; None where it is not among these.

        Raises:
            ShearingError: they are not what was written.
        """
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            return None
        return self._at(place)

    def stored(self) -> dict[int, bytes]:
        """The bytes of every row, by row.

        Raises:
            ShearingError: they are not what was written.
        """
        return {row: self._at(place) for place, row in enumerate(self.rows.tolist())}

    def _at(self, place: int) -> bytes:
        begin = int(self._ends[place - 1]) if place else 0
        stored = self._stored[begin : int(self._ends[place])].tobytes()
        if zlib.crc32(stored) != self._checks[place]:
            raise self.damaged(int(self.rows[place]))
        return stored

    def damaged(self, row: int) -> ShearingError:
        """What there is to say of a row that is not what was written."""
        return ShearingError(
            str(self._path),
            value=f"row {row}: other bytes than were written",
            allowed="bytes that are",
            mend=WRITE_AGAIN,
        )
