"""Which tokens count in a loss: one bit each beside the tokens of a part, where some do not.

    CORPUS/DOMAIN/train_counted.bin    1 for a token that counts; eight in a byte, the first in its highest bit

A label counts if the token that it is does. Where there is no such file, all do.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shearing.files.mapped_arrays import map_file


def counted_path(folder: Path, part: str) -> Path:
    """The file that says which tokens of a part count."""
    return folder / f"{part}_counted.bin"


class Counted:
    """Which tokens of a part count, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self._bits = map_file(path, dtype="uint8")

    def read(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Of tokens [start, stop) whether they count; bool [stop - start]."""
        bits = np.unpackbits(self._bits[start // 8 : -(-stop // 8)])
        return bits[start % 8 : start % 8 + stop - start].astype(np.bool_)


class BitsWriter:
    """Writes the file, part by part."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._rest = np.empty(0, dtype=np.bool_)
        self.count = 0

    def write(self, counted: npt.NDArray[np.bool_]) -> None:
        """Append of the next tokens whether they count."""
        self.count += int(counted.sum())
        bits = np.concatenate([self._rest, counted])
        whole = len(bits) // 8 * 8
        self._put(bits[:whole])
        self._rest = bits[whole:]

    def close(self) -> str:
        """Flush to disk; returns the SHA-256 of the file."""
        self._put(self._rest)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def _put(self, bits: npt.NDArray[np.bool_]) -> None:
        data = np.packbits(bits).tobytes()
        self._digest.update(data)
        self._file.write(data)
