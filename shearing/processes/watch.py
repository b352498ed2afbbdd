"""The watch over the processes of one run: one that fails or falls silent ends all, with its reason shown.

A launcher ends the processes of its own host when one of them dies. It does not see a host that is cut off, a process
that hangs, or the other hosts: those would wait for training's time limit, half an hour, and then print what their
network library thinks of it. So each process signs, every second, at a small store in the main process, and reads
whether anyone has failed. The first process of each host prints what ended the run, because each has a log of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
from typing_extensions import Self

from shearing.errors import ShearingError, key
from shearing.processes.launcher import CONTINUES
from shearing.processes.stop import StoppedAtOnce

INTERVAL = 1.0
"""Seconds between two signs of life."""

SILENCE = 45.0
"""Seconds without a sign of life after which a process counts as lost."""

_GRACE = 5.0
"""Seconds in which the process that failed first may tell, before those that lost it report what they saw."""

_LONGEST_ROUND = 5 * INTERVAL
"""As much as a round of the watch counts at most: one that took longer was stopped itself (a suspended job), and the
silence of others in that time says nothing about them."""

_REMINDER = 60.0
"""Seconds between two lines about the processes that have not come."""

_FAILURE = "failure"


class Watch:
    """Threads of one process that sign its life and end it when the run has failed.

    Args:
        store: this process's connection to the store in the main process.
        rank, size: this process among all.
        place: where the store is, for messages.
        tells: whether this process prints what ended the run, for those of its host.
    """

    def __init__(self, store: Any, *, rank: int, size: int, place: str, tells: bool) -> None:
        self._store, self._rank, self._size, self._place, self._tells = store, rank, size, place, tells
        self._where = f"process {rank} of {size} on {os.uname().nodename}"
        self._main_host = self._host(0)  # asked while it can be reached
        self._clock = 0.0  # seconds that this process was awake
        self._heard = 0.0
        self._main_answers = True
        self._closing = threading.Event()
        self._ending = threading.Lock()
        self._last_signs: dict[int, tuple[bytes, float]] = {}
        self._threads = [
            threading.Thread(target=target, name=f"watch-{target.__name__}", daemon=True)
            for target in (self._sign, self._guard)
        ]

    @classmethod
    def start(cls, *, rank: int, size: int, meeting: Any, seconds: float, tells: bool) -> Self:
        """Open the store in the main process and start the threads, in every process; the main one waits for all.

        Args:
            rank, size: this process among all.
            meeting: the launcher's store, at which the processes learn where the watch's own is.
            seconds: how long to wait for the others.
            tells: whether this process prints what ended the run, for those of its host.

        Raises:
            ShearingError: some processes did not come.
        """
        address = os.environ["MASTER_ADDR"]
        # A port of its own: the launcher's store may be gone before the last process is.
        open_store: Any = partial(
            vars(torch.distributed)["TCPStore"], address, wait_for_workers=False, timeout=timedelta(seconds=SILENCE)
        )
        if rank == 0:
            store = open_store(0, is_master=True)
            store.set(_host_key(0), os.uname().nodename)
            meeting.set("watch/port", str(store.port))
        else:
            store = open_store(int(meeting.get("watch/port")), is_master=False)
            store.set(_host_key(rank), os.uname().nodename)
        store.set(_sign_key(rank), "0")
        if rank == 0:
            _wait_for_all(store, size=size, seconds=seconds)
        watch = cls(store, rank=rank, size=size, place=f"{address}:{store.port}", tells=tells)
        for thread in watch._threads:
            thread.start()
        return watch

    def close(self) -> None:
        """Stop watching; every process has passed its last exchange."""
        self._closing.set()
        for thread in self._threads:
            thread.join(timeout=2 * INTERVAL)
        with contextlib.suppress(Exception):
            self._store.set(f"left/{self._rank}", "")
            if self._rank == 0:  # the store lives here, and the others may be in the middle of a look
                self._store.wait([f"left/{rank}" for rank in range(self._size)], timedelta(seconds=10 * INTERVAL))

    def fail(self, error: BaseException, *, lost_peer: bool) -> NoReturn:
        """Print an error, tell it to all processes and end this one.

        Args:
            error: what ended this process.
            lost_peer: it is that another process is gone; that one's own message comes first, if it has one.
        """
        with contextlib.suppress(ValueError):  # only the main thread may
            # A launcher that has seen another process die asks this one to end, before it has said what it knows.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if lost_peer:
            self._fail_for_a_peer(error)
        self._ending.acquire()
        code = exit_code(error)
        if isinstance(error, KeyboardInterrupt):
            text = f"{self._where} was interrupted"
            self._print(text)
        elif isinstance(error, StoppedAtOnce):
            text = f"{self._where} was asked to stop ({error.signal})"
            self._print(text)
        elif isinstance(error, ShearingError):
            text = f"{self._where}: {error}"
            trace = "".join(traceback.format_exception(error)) if os.environ.get("SHEARING_DEBUG") else ""
            print(f"{trace}error in {text}", file=sys.stderr, flush=True)
        else:
            text = f"{self._where}: {type(error).__name__}: {error}"
            trace = "".join(traceback.format_exception(error))
            print(f"error in {self._where}:\n{trace}", file=sys.stderr, flush=True)
        self._publish(text, code=code)
        self._end(code)

    def lose_launcher(self, reason: str) -> NoReturn:
        """Tell all processes that this one's launcher is gone, and end it.

        Args:
            reason: which launcher, and of which process.
        """
        # In a thread: the store may be out of reach as well, and this process is to end within seconds.
        telling = threading.Thread(target=partial(self._publish, reason, code=1), daemon=True)
        telling.start()
        telling.join(timeout=3 * INTERVAL)
        self._end_with(text=reason, code=1)

    def _fail_for_a_peer(self, error: BaseException) -> NoReturn:
        """The main process knows who is gone and tells the others, unless it is itself the one."""
        since = self._clock
        while self._clock - since < (_GRACE if self._rank == 0 else 3 * _GRACE):
            time.sleep(INTERVAL / 2)  # ended by `_sign` if another process has told its reason
            if self._rank != 0 and not self._main_answers and self._clock - since >= _GRACE:
                break
        self._ending.acquire()
        if self._rank == 0:
            lost = ", ".join(f"process {rank} on {self._host(rank)}" for rank in sorted(self._quiet_ones()))
        else:
            lost = "" if self._main_answers else f"the main process on {self._main_host}"
        text = f"{self._where} lost contact with {lost or 'another process'}: {_reason(error)}"
        self._print(text, main_is_lost=not self._main_answers)
        if self._rank == 0 or self._main_answers:
            self._publish(text, code=1)
        self._end(1)

    def _sign(self) -> None:
        count = 0
        while not self._closing.wait(INTERVAL):
            count += 1
            try:
                self._store.set(_sign_key(self._rank), str(count))
                if self._store.check([_FAILURE]):
                    self._end_with(**json.loads(self._store.get(_FAILURE)))
                if self._rank == 0:
                    self._look_around()
                self._main_answers = True
                self._heard = self._clock
            except Exception:  # noqa: BLE001  `_guard` decides for how long this may go on
                self._main_answers = False

    def _look_around(self) -> None:
        for rank in range(1, self._size):
            sign = self._store.get(_sign_key(rank))
            last = self._last_signs.get(rank)
            if last is None or last[0] != sign:
                self._last_signs[rank] = (sign, self._clock)
            elif self._clock - last[1] > SILENCE:
                self._publish(
                    f"process {rank} of {self._size} on {self._host(rank)} has not been heard of for {SILENCE:.0f} s: "
                    "it was killed, hangs, or its host is cut off",
                    code=1,
                )

    def _guard(self) -> None:
        last = time.monotonic()
        while not self._closing.wait(INTERVAL):
            now = time.monotonic()
            self._clock += min(now - last, _LONGEST_ROUND)
            last = now
            if self._clock - self._heard > SILENCE:
                self._end_with(
                    text=f"{self._where} has had no contact with the main process on {self._main_host} "
                    f"({self._place}) for {SILENCE:.0f} s: that process was killed, or one of the hosts is cut off",
                    code=1,
                    main_is_lost=True,
                )

    def _quiet_ones(self) -> set[int]:
        return {rank for rank, (_, since) in list(self._last_signs.items()) if self._clock - since > 3 * INTERVAL}

    def _host(self, rank: int) -> str:
        with contextlib.suppress(Exception):
            return str(self._store.get(_host_key(rank)).decode())
        return "an unknown host"

    def _publish(self, text: str, *, code: int) -> None:
        with contextlib.suppress(Exception):
            self._store.compare_set(_FAILURE, "", json.dumps({"text": text, "code": code}))

    def _print(self, text: str, *, main_is_lost: bool = False) -> None:
        # The main process's host has lost the one that tells; the next one is at hand there, or tells anyway.
        if self._tells or (main_is_lost and self._rank == 1):
            print(f"error: {text}\n{CONTINUES}", file=sys.stderr, flush=True)

    def _end_with(self, *, text: str, code: int, main_is_lost: bool = False) -> NoReturn:
        self._ending.acquire()
        self._print(text, main_is_lost=main_is_lost)
        self._end(code)

    def _end(self, code: int) -> NoReturn:
        self._closing.set()
        if self._tells:
            time.sleep(3 * INTERVAL)  # the others read it here; and a launcher kills whoever has not yet printed
        # Without clean-up: other threads are stuck in exchanges with a process that is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(error: BaseException) -> int:
    """What the process ends with: 2 for what the user can mend, 130 for Ctrl-C, 1 for everything else."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 2 if isinstance(error, ShearingError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def _reason(error: BaseException) -> str:
    """What the network library says, without where in its source it says so and whom else to ask."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*:\d+\] ", "", line).partition(". This is typically caused")[0]


def _wait_for_all(store: Any, *, size: int, seconds: float) -> None:
    """Wait until every process has signed once, and say for whom."""
    deadline = time.monotonic() + seconds
    missing = list(range(size))
    while missing:
        left = deadline - time.monotonic()
        try:
            store.wait([_sign_key(rank) for rank in missing], timedelta(seconds=max(0.001, min(left, _REMINDER))))
            return
        except RuntimeError:
            missing = [rank for rank in missing if not store.check([_sign_key(rank)])]
        if missing and left <= _REMINDER:
            raise ShearingError(
                "WORLD_SIZE (set by the launcher)",
                value=size,
                allowed=f"as many processes as have started; not heard of within {seconds:.0f} s: {_listed(missing)}",
                mend=f"look into the logs of the hosts where they should be; {key('timeout')} is how long to wait",
            )
        if missing:
            print(f"waiting for {_listed(missing)} of {size} to start", file=sys.stderr, flush=True)


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"process {shown}" if len(ranks) == 1 else f"processes {shown}{', …' if len(ranks) > 8 else ''}"


def _sign_key(rank: int) -> str:
    return f"sign/{rank}"


def _host_key(rank: int) -> str:
    return f"host/{rank}"
