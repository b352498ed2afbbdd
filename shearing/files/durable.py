"""Files that are there whole or not at all, whatever stops the process, and folders that one process holds."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shearing.errors import ShearingError

LOCK = ".lock"
_BESIDE = re.compile(r"\..+\.\d+")
"""A file that `write_text` has not renamed into place, by its name."""


def existing_folder(path: Path) -> Path:
    """The path itself if there is anything, or the nearest folder above it that there is."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def require_new(path: Path, *, field: str) -> None:
    """Check that there is nothing yet where a folder is to be made.

    Args:
        path: of the folder.
        field: the setting that names it.

    Raises:
        ShearingError: there is something.
    """
    if path.exists():
        raise ShearingError(
            field,
            value=str(path),
            allowed="a folder that does not exist yet",
            mend="choose another folder, or remove what is there",
        )


def require_writable(path: Path, *, field: str) -> None:
    """Check that files can be written below a folder, without writing any.

    Args:
        path: existing or to be made.
        field: the setting that names it.

    Raises:
        ShearingError: the folder, or the nearest folder above it that exists, is no folder or not writable.
    """
    existing = existing_folder(path)
    if not existing.is_dir():
        raise ShearingError(
            field,
            value=str(path),
            allowed="a folder, existing or to be made",
            mend=f"{existing} is a file: choose another {field}",
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ShearingError(
            field,
            value=str(path),
            allowed="a folder that you may write in",
            mend=f"there is no write permission for {existing}: choose another {field} or mend the permission",
        )


@contextlib.contextmanager
def locked(folder: Path, *, field: str) -> Iterator[None]:
    """Create a folder and keep other processes from working in it.

    The lock belongs to the open file, not to its presence: the kernel drops it when the process ends in any way. Files
    that a killed process had begun to write (`write_text`) are removed.

    Args:
        folder: made if absent.
        field: the setting that names it.

    Raises:
        ShearingError: another process is at work here, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ShearingError(
            field,
            value=f"{folder} ({error.strerror})",
            allowed="a folder that can be made",
            mend=f"choose another {field}",
        ) from error
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ShearingError(
                field,
                value=str(folder),
                allowed="a folder that no other process works in",
                mend=f"wait for process {file.read().strip() or '(unknown)'} or choose another {field}",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        for path in folder.rglob(".*"):
            # Whoever was writing it was killed: nobody else works here.
            if _BESIDE.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)
        yield


def finite_or_none(value: float) -> float | None:
    """A number as JSON can hold it, which has no NaN."""
    return value if math.isfinite(value) else None


def write_json(path: Path, payload: dict[str, Any]) -> None:
    """Write a JSON object so that a reader sees the whole file or the one before it, also after a crash.

    Args:
        path: file to write; its folder is made.
        payload: JSON-able values; NaN and infinities are refused because JSON has none.

    Raises:
        ValueError: a value that is not finite.
    """
    write_text(path, json.dumps(payload, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ShearingError: no JSON object in there.
    """
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        payload = error
    if not isinstance(payload, dict):
        raise ShearingError(
            str(path),
            value=str(payload),
            allowed="a JSON object",
            mend=f"the file was damaged or edited: remove {path} and run the stage that writes it again",
        )
    return payload


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, flush it to disk and rename it into place; see `write_json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_file(path: Path) -> None:
    """Force a file to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_tree(folder: Path) -> None:
    """Force every file and folder below a folder, and the folder itself, to disk."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            flush_folder(path)
        else:
            flush_file(path)
