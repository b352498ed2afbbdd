"""Files and folders that may not be read: told from missing, damaged or unreachable ones, whose mend makes things anew.

Libraries differ in what they say of such a file, down to that there is none; so it is looked up here.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from shearing.errors import ShearingError


def forbidden(path: Path, *, error: BaseException | None = None) -> ShearingError | None:
    """The error about what there is no read permission for; None where something else is the matter.

    Args:
        path: what was to be read, file or folder.
        error: that reading it has raised; an operating system's own word counts, whatever the permissions look like.
    """
    # What a link leads to may be closed where nothing on the way to the link is.
    closed = _closed(path.absolute()) or _closed(Path(os.path.realpath(path)))
    if closed is None and isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        closed = path
    if closed is None:
        return None
    return ShearingError(
        str(path),
        value="no permission",
        allowed="a file or folder that you may read",
        mend=f"there is no read permission for {closed}: mend the permission",
    )


def _closed(path: Path) -> Path | None:
    """The first folder on the way to a file that may not be entered, or what may not be read itself.

    A path's own methods raise where a link leads through such a folder, before Python 3.12; those of `os.path` do not.
    """
    for folder in reversed(path.parents):
        if not os.access(folder, os.X_OK):
            return folder if os.path.isdir(folder) else None  # noqa: PTH112
    wanted = os.R_OK | os.X_OK if os.path.isdir(path) else os.R_OK  # noqa: PTH112
    return path if os.path.exists(path) and not os.access(path, wanted) else None  # noqa: PTH110
