"""A disk or a quota that is full: how it is told from other errors, and whose words it is said in.

Writers of files let the error through, because only the caller knows what was being written and what frees space.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from shearing.errors import ShearingError

_CAME_SHORT = re.compile(r"Not enough free space|\d+ requested and \d+ written")
"""What numpy says of a write, in place of the operating system's number."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that a disk or a quota is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT) or _CAME_SHORT.match(str(error)) is not None
    # safetensors wraps the operating system's error in its text.
    return isinstance(error, SafetensorError) and f"os error {errno.ENOSPC}" in str(error)


def no_room_for_model(output: Path, *, field: str) -> ShearingError:
    """The error about a disk on which a model's folder has no room.

    Args:
        output: the folder that was to be made.
        field: the setting that names it.
    """
    return ShearingError(
        field,
        value=f"{output.parent}, with {shutil.disk_usage(output.parent).free / 1e9:.2f} GB free",
        allowed="a disk with room for the model",
        mend="free space and run the same command again, or choose a folder on another disk",
    )


@contextlib.contextmanager
def full_disk_said(say: Callable[[], ShearingError]) -> Iterator[None]:
    """Where the block finds a disk full, the error is what `say` returns; all other errors pass."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise say() from error
        raise
