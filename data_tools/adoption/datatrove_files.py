"""Tokens as datatrove and nanotron write them.

NAME.ds             tokens one after the other, 2 or 4 bytes each, little-endian
NAME.ds.index       uint64, where each document ends, in tokens
NAME.ds.metadata    "tokenizer|bytes of a token", number of tokens, the same for people (may be absent)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.adoption.foreign import ForeignFile, ForeignSet
from shearing.errors import ShearingError

SUFFIX = ".ds"


def datatrove_files(path: Path) -> list[Path]:
    """The `.ds` file at `path`, or all in the folder, at any depth."""
    if path.is_dir():
        return sorted(file for file in path.rglob(f"*{SUFFIX}") if file.is_file())
    return [path] if path.suffix == SUFFIX and path.is_file() else []


def find_in_datatrove(files: list[Path]) -> ForeignSet:
    """The documents of `.ds` files.

    Raises:
        ShearingError: an index is missing, or does not fit its file.
    """
    found, names = [], set()
    for path in files:
        name, size = _metadata(path)
        names.add(name)
        found.append(_file(path, token_bytes=size))
    return ForeignSet("datatrove", tuple(found), tokenizer=names.pop() if len(names) == 1 else None)


def _file(path: Path, *, token_bytes: int | None) -> ForeignFile:
    index = path.with_name(f"{path.name}.index")
    if not index.is_file():
        raise ShearingError(
            str(index),
            value="missing",
            allowed="where documents end, beside each .ds file",
            mend="write it with datatrove's save_index=True",
        )
    ends = np.fromfile(index, dtype="<u8").astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    tokens = int(ends[-1]) if len(ends) else 0
    size = path.stat().st_size
    if (lengths < 0).any() or index.stat().st_size % 8:
        raise ShearingError(
            str(index), value="ends that do not rise", allowed="uint64 document ends", mend="the file is damaged"
        )
    fitting = [each for each in (2, 4) if tokens * each == size and token_bytes in (None, each)]
    if not fitting:
        raise ShearingError(
            str(path),
            value=f"{size} bytes",
            allowed=f"{tokens} tokens, as its index says, of {token_bytes or '2 or 4'} bytes each",
            mend="the file or its index is damaged, or of another set",
        )
    return ForeignFile(path, f"<u{fitting[0]}", ends - lengths, lengths)


def _metadata(path: Path) -> tuple[str | None, int | None]:
    """Name of the tokenizer, bytes of a token; each None where it is not said."""
    file = path.with_name(f"{path.name}.metadata")
    if not file.is_file():
        return None, None
    name, _, size = file.read_text(encoding="utf-8").partition("\n")[0].rpartition("|")
    return name or None, int(size) if size in ("2", "4") else None
