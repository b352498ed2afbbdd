"""Memory that was freed goes back to the system, so that one layer after the other takes no more than one layer."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def give_back() -> None:
    """Hand freed memory back to the system, where the C library can be told to.

    glibc serves tensors of up to 32 MB from its heap and keeps what is freed between them: a few megabytes for every
    layer of a small model.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
