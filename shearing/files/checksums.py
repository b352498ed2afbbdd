"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

Advance = Callable[[int], None]
"""Called with the number of bytes just read."""

_BYTES_AT_A_TIME = 1 << 20


def sha256_of_file(path: Path, *, advance: Advance = lambda _: None) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_BYTES_AT_A_TIME):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()
