"""What tells files from another state of them without reading them: their names, sizes and times of change."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def states_of(files: Iterable[Path], *, within: Path) -> list[str]:
    """`NAME:SIZE:TIME` of each file, by their names; bytes, and nanoseconds since 1970.

    Args:
        files: links stand for what they lead to.
        within: folder that they are in, from which they are named.
    """
    found = ((path.relative_to(within), path.stat()) for path in sorted(files))
    return [f"{name}:{status.st_size}:{status.st_mtime_ns}" for name, status in found]
