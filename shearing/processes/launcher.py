"""The launcher of a process: one that is gone takes its processes along.

A launcher ends its processes when one of them fails, or when it is asked to. Killed itself, it ends nobody: they would
train on, or wait for one another for training's time limit, with their devices held. So each of them looks every second
whether those that started it are still there: its parent, and above it launchers that start launchers (`deepspeed` has
one more process on each host). From a shell people go away and leave a run behind, so a shell is not waited for.

The kernel's notice, PR_SET_PDEATHSIG, would be a second faster, but comes also where only the parent's thread that
started the process has ended, says nothing of a launcher's launcher, and kills without a word.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath

CONTINUES = "all processes of the run end here; the same command continues from the last checkpoint"

_INTERVAL = 1.0
"""Seconds between two looks."""

_SHELLS = {"sh", "bash", "dash", "ash", "ksh", "zsh", "fish", "csh", "tcsh", "busybox"}

_PROGRAMS = {"torchrun", "accelerate", "deepspeed"}

_MODULES = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands", "deepspeed.launcher")

_MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
"""Variables by which torchrun (with accelerate) and deepspeed show that they started a process; both run in Python."""


@dataclass(frozen=True)
class Ancestor:
    """A process that started this one, or one that started that.

    Attributes:
        pid: its number.
        began: when it was started, in the kernel's own clock: numbers are given again, to processes that begin later.
        command: what it was started with.
    """

    pid: int
    began: str
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """The program, as people call it: a module or script rather than the Python that runs it."""
        program = _last(self.command[0]) if self.command else "a process"
        if not self.in_python:
            return program
        for word, following in zip(self.command[1:], [*self.command[2:], ""], strict=False):
            if not word.startswith("-"):
                return _last(word)
            if word in ("-m", "-c"):
                return (following if word == "-m" else "") or program
        return program

    @property
    def in_python(self) -> bool:
        """Whether Python runs it."""
        return bool(self.command) and "python" in _last(self.command[0])

    @property
    def is_shell(self) -> bool:
        """Whether it is one that people leave."""
        return bool(self.command) and _last(self.command[0]).lstrip("-") in _SHELLS

    @property
    def is_launcher(self) -> bool:
        """Whether it is a launcher by name."""
        return self.in_python and (self.name in _PROGRAMS or self.name.startswith(_MODULES))

    def is_gone(self) -> bool:
        """Whether it has ended; nobody may have asked for its exit code yet."""
        found = _read(self.pid)
        return found is None or found.state in "ZX" or found.began != self.began


@dataclass(frozen=True)
class _Entry:
    """What the kernel says of a process."""

    parent: int
    state: str
    began: str


class LauncherGuard:
    """A thread that ends this process when one of its launchers is gone.

    Args:
        parent: number of the parent that must not change; None: it may.
        launchers: further ancestors that must not end, nearest first.
        ancestors: all of them, for names.
    """

    def __init__(self, *, parent: int | None, launchers: Sequence[Ancestor], ancestors: Sequence[Ancestor]) -> None:
        self._parent, self._launchers = parent, launchers
        self._names = {ancestor.pid: ancestor.name for ancestor in ancestors}
        self._tell: Callable[[str], object] | None = None

    @classmethod
    def start(cls) -> LauncherGuard:
        """Look from now on, from a thread of its own; a process without a launcher needs no thread."""
        parent, above = os.getppid(), ancestors()
        started_by_one = any(name in os.environ for name in ("RANK", "WORLD_SIZE"))
        guard = cls(
            parent=parent if parent > 1 and not (above and above[0].is_shell) else None,
            launchers=[ancestor for ancestor in above[1:] if ancestor.is_launcher],
            ancestors=above,
        )
        if started_by_one and is_left_behind(above, marks=_MARKS):
            guard._end(f"what started {_here()} was gone before it had begun")
        if started_by_one and (guard._parent is not None or guard._launchers):
            threading.Thread(target=guard._look, name="launcher", daemon=True).start()
        return guard

    def tell_through(self, tell: Callable[[str], object]) -> None:
        """From now on, end by `tell(reason)`, which lets the processes of other hosts know, and ends this one."""
        self._tell = tell

    def gone(self) -> str | None:
        """Which launcher is gone, in words; None: all are there."""
        if self._parent is not None and os.getppid() != self._parent:
            return f"{self._names.get(self._parent, 'the launcher')} (process {self._parent})"
        return next((f"{each.name} (process {each.pid})" for each in self._launchers if each.is_gone()), None)

    def _look(self) -> None:
        while (lost := self.gone()) is None:
            time.sleep(_INTERVAL)
        self._end(f"{lost}, which started {_here()}, was killed, or ended without ending its processes")

    def _end(self, reason: str) -> None:
        if self._tell is not None:
            self._tell(reason)
        # Straight to the descriptor: who reads it may be gone as well, and a thread may be stuck in printing.
        with contextlib.suppress(OSError):
            if os.environ.get("LOCAL_RANK", "0") == "0":
                os.write(2, f"error: {reason}\n{CONTINUES}\n".encode())
        os._exit(1)


@cache
def launcher_guard() -> LauncherGuard:
    """The one of this process, which begins to look when it is first asked for."""
    return LauncherGuard.start()


def ancestors() -> list[Ancestor]:
    """Those of this process, nearest first; none where the system has no /proc, or they are of another container."""
    found: list[Ancestor] = []
    pid = os.getppid()
    while pid > 0 and (entry := _read(pid)) is not None:
        command: tuple[str, ...] = ()
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            command = tuple(text.rstrip("\0").split("\0"))
        found.append(Ancestor(pid, entry.began, command))
        pid = entry.parent
    return found


def is_left_behind(above: Sequence[Ancestor], *, marks: Sequence[str]) -> bool:
    """Whether a launcher started this process and is gone already: it is not among its ancestors.

    Args:
        above: the ancestors, nearest first; without any, nothing can be said.
        marks: variables by which launchers that run in Python show themselves.
    """
    return any(mark in os.environ for mark in marks) and bool(above) and not any(each.in_python for each in above)


def _read(pid: int) -> _Entry | None:
    """What /proc says; None: no such process, or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may have anything in it
    return _Entry(parent=int(fields[1]), state=fields[0], began=fields[19])


def _here() -> str:
    rank, size = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
    return f"process {rank} of {size} on {os.uname().nodename}"


def _last(path: str) -> str:
    return PurePath(path).name
