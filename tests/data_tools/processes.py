"""Preparations in processes of their own, for tests that kill them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data_tools.preparation.work_folder import PREFIX
from tests.repository import ROOT

STARTED: list[subprocess.Popen[str]] = []


def start(command: Sequence[str], *, output: Path) -> subprocess.Popen[str]:
    """`shear` with these arguments, in a process group of its own that does not outlive the test."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "shearing", *command, "-o", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


def end_all() -> None:
    """End what was started and is still there."""
    while STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(STARTED.pop().pid, signal.SIGKILL)


def shards(output: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each finished shard."""
    found = {}
    for path in output.glob(f"{PREFIX}*/shards/[0-9]*/shard.json"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found[path.parent.name] = (status.st_ino, status.st_mtime_ns)
    return found


def wait_for(condition: Callable[[], bool], *, seconds: float = 100.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def gone(group: int) -> bool:
    """Whether no process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False
