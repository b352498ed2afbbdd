"""Processes of tests: forks of one server that has imported everything, so that each costs milliseconds.

There is one such server in a process, and who asks last says what it imports. So all tests ask here.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.preload"])


def start_shear(arguments: Sequence[str | Path], *, output: Path) -> BaseProcess:
    """`shear` with these arguments, in a process of its own that writes what it says to a file."""
    process = PROCESSES.Process(target=_shear, args=([str(argument) for argument in arguments], output))
    process.start()
    return process


def write_to(output: Path) -> None:
    """Let this process say what it says to a file, as all that it starts."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)


def _shear(arguments: Sequence[str], output: Path) -> None:
    write_to(output)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = ["shear", *arguments]
    import torch

    from shearing.cli import main

    torch.set_num_threads(1)
    main()
