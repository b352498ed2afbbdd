"""Requests to stop, by SIGTERM, SIGINT or SIGUSR1: what is raised once one is heard, and where it ends work at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later; a launcher can requeue on it."""

_AT_ONCE = (signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C ends work at once by itself, as KeyboardInterrupt."""


class StopAsked(Exception):  # noqa: N818  nothing went wrong
    """All processes have heard of a request to stop, at the same place in something that can be begun again.

    Attributes:
        signal: by which one of them was asked.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number).name
        super().__init__(self.signal)


class StoppedAtOnce(SystemExit):
    """A signal ended what the same command begins again; other processes have not heard of it.

    Attributes:
        signal: which.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number).name
        super().__init__(INTERRUPTED_EXIT_CODE)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Where nothing is lost but what is under way, SIGTERM and SIGUSR1 end it, wherever it is.

    Raises:
        StoppedAtOnce: one of them came. A second one acts as it did before.
    """
    if threading.current_thread() is not threading.main_thread():  # no other may handle signals
        yield
        return

    def hand_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        hand_back()
        raise StoppedAtOnce(number)

    before = {number: signal.signal(number, end) for number in _AT_ONCE}
    try:
        yield
    finally:
        hand_back()
