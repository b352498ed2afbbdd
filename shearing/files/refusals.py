"""What the operating system refuses of a file, where nobody nearer to it has said anything better."""

from __future__ import annotations

from pathlib import Path

from shearing.errors import ShearingError
from shearing.files.full_disk import is_disk_full
from shearing.files.permissions import forbidden


def said_of_file(error: BaseException) -> ShearingError | None:
    """The error about a file, or a full disk, for a user; None where it is of neither, and so a mistake of ours.

    Args:
        error: that ended a command.
    """
    if not isinstance(error, OSError):
        return None
    value = error.strerror or str(error)
    if is_disk_full(error):
        field = "disk" if error.filename is None else str(error.filename)
        return ShearingError(field, value=value, allowed="a disk with room", mend="free space")
    if not isinstance(error.filename, str | Path):
        return None
    return forbidden(Path(error.filename)) or ShearingError(
        str(error.filename),
        value=value,
        allowed="a file or folder that can be used",
        mend="look what is there; `SHEARING_DEBUG=1 shear …` shows what it was wanted for",
    )
