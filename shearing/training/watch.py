"""The watch over the processes of one run: one that fails or falls silent ends all, with its reason shown.

A launcher ends the processes of its own host when one of them dies. It does not see a host that is cut off, a process
that hangs, or the other hosts: those would wait for training's time limit, half an hour, and then print what their
network library thinks of it. So each process signs, every second, at a small store in the main process, and reads
whether anyone has failed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
from typing_extensions import Self

from shearing.errors import ShearingError

INTERVAL = 1.0
"""Seconds between two signs of life."""

SILENCE = 45.0
"""Seconds without a sign of life after which a process counts as lost."""

_GRACE = 5.0
"""Seconds in which the process that failed first may tell, before those that lost it report what they saw."""

FAILED_EXIT_CODE = 1

_FAILURE = "failure"


class Watch:
    """Threads of one process that sign its life and end it when the run has failed.

    Args:
        store: this process's connection to the store in the main process.
        rank, size: this process among all.
        place: where the store is, for messages.
    """

    def __init__(self, store: Any, *, rank: int, size: int, place: str) -> None:
        self._store, self._rank, self._size, self._place = store, rank, size, place
        self._heard = time.monotonic()
        self._closing = threading.Event()
        self._last_signs: dict[int, tuple[bytes, float]] = {}
        self._silent: dict[int, float] = {}
        self._threads = [
            threading.Thread(target=target, name=f"watch-{target.__name__}", daemon=True)
            for target in (self._sign, self._guard)
        ]

    @classmethod
    def start(cls, *, rank: int, size: int, share: Callable[[Any], Any]) -> Self:
        """Open the store in the main process and start the threads, in every process.

        Args:
            rank, size: this process among all.
            share: gives every process what the main one hands to it; the only way in which processes talk here.
        """
        address = os.environ["MASTER_ADDR"]
        # A port of its own: the launcher's store may be gone before the last process is.
        open_store: Any = partial(
            vars(torch.distributed)["TCPStore"], address, wait_for_workers=False, timeout=timedelta(seconds=SILENCE)
        )
        served = open_store(0, is_master=True) if rank == 0 else None
        port = share(None if served is None else served.port)
        store = served or open_store(port, is_master=False)
        store.set(_host_key(rank), os.uname().nodename)
        store.set(_sign_key(rank), "0")
        share(None)
        watch = cls(store, rank=rank, size=size, place=f"{address}:{port}")
        for thread in watch._threads:
            thread.start()
        return watch

    def close(self) -> None:
        """Stop watching; every process has passed its last exchange."""
        self._closing.set()
        if self._rank == 0:
            time.sleep(2 * INTERVAL)  # the store lives here, and the others' threads may be in the middle of a look
        for thread in self._threads:
            thread.join(timeout=2 * INTERVAL)

    def fail(self, error: BaseException, *, lost_peer: bool) -> NoReturn:
        """Print an error, tell it to all processes and end this one.

        Args:
            error: what ended this process.
            lost_peer: it is that another process is gone; that one's own message comes first, if it has one.
        """
        where = f"process {self._rank} of {self._size} on {os.uname().nodename}"
        if lost_peer:
            time.sleep(_GRACE)  # ended by `_sign` if another process has told its reason
            silent = ", ".join(f"{rank} on {self._host(rank)}" for rank in sorted(self._quiet_ones()))
            text = f"{where} lost contact with {silent or 'another process'}: {str(error).splitlines()[0]}"
            if self._rank == 0:
                print(f"error: {text}\n{_CONTINUES}", file=sys.stderr, flush=True)
        else:
            text = f"{where}: {error if isinstance(error, ShearingError) else f'{type(error).__name__}: {error}'}"
            if isinstance(error, ShearingError):
                print(f"error in {text}", file=sys.stderr, flush=True)
            else:
                print(f"error in {where}:\n{''.join(traceback.format_exception(error))}", file=sys.stderr, flush=True)
        self._closing.set()
        with contextlib.suppress(Exception):
            self._store.compare_set(_FAILURE, "", text)
        if self._rank == 0:
            time.sleep(3 * INTERVAL)  # the others read it here
        _end(2 if isinstance(error, ShearingError) else FAILED_EXIT_CODE)

    def _sign(self) -> None:
        count = 0
        while not self._closing.wait(INTERVAL):
            count += 1
            try:
                self._store.set(_sign_key(self._rank), str(count))
                if self._store.check([_FAILURE]):
                    self._end_with(self._store.get(_FAILURE).decode())
                if self._rank == 0:
                    self._look_around()
                self._heard = time.monotonic()
            except Exception:  # noqa: BLE001, S112  `_guard` decides for how long this may go on
                continue

    def _look_around(self) -> None:
        now = time.monotonic()
        for rank in range(1, self._size):
            sign = self._store.get(_sign_key(rank))
            last = self._last_signs.get(rank)
            if last is None or last[0] != sign:
                self._last_signs[rank] = (sign, now)
            elif now - last[1] > SILENCE:
                self._store.compare_set(
                    _FAILURE,
                    "",
                    f"process {rank} on {self._host(rank)} has not been heard of for {SILENCE:.0f} s: "
                    "it was killed, hangs, or its host is cut off",
                )

    def _guard(self) -> None:
        last = time.monotonic()
        while not self._closing.wait(INTERVAL):
            now = time.monotonic()
            if now - last > 10 * INTERVAL:
                # All of this process was stopped (a suspended job): silence then says nothing about the others.
                self._heard = now
                self._last_signs.clear()
            last = now
            if now - self._heard > SILENCE:
                self._end_with(
                    f"process {self._rank} on {os.uname().nodename} has had no contact with the main process at "
                    f"{self._place} for {SILENCE:.0f} s: that process was killed, or one of the hosts is cut off",
                    own=True,
                )

    def _quiet_ones(self) -> set[int]:
        now = time.monotonic()
        return {rank for rank, (_, since) in self._last_signs.items() if now - since > 3 * INTERVAL}

    def _host(self, rank: int) -> str:
        with contextlib.suppress(Exception):
            return str(self._store.get(_host_key(rank)).decode())
        return "an unknown host"

    def _end_with(self, text: str, *, own: bool = False) -> NoReturn:
        if own or self._rank == 0:
            print(f"error: {text}\n{_CONTINUES}", file=sys.stderr, flush=True)
        if self._rank == 0:
            time.sleep(2 * INTERVAL)
        _end()


_CONTINUES = "all processes of the run end here; the same command continues from the last checkpoint"


def _end(code: int = FAILED_EXIT_CODE) -> NoReturn:
    # Without clean-up: other threads are stuck in exchanges with a process that is gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _sign_key(rank: int) -> str:
    return f"sign/{rank}"


def _host_key(rank: int) -> str:
    return f"host/{rank}"
