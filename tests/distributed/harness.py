"""Runs a program on several processes of this machine, as a launcher would, and tells what each of them said.

A process costs a fork (see `tests.forks`), and talks to the others over gloo.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.forks import PROCESSES, write_to

SECONDS = 240.0


@dataclass
class Group:
    """Processes under way.

    Attributes:
        processes: by rank.
        outputs: the file that takes stdout and stderr of each.
    """

    processes: Sequence[BaseProcess]
    outputs: Sequence[Path]

    def wait(self, *, seconds: float = SECONDS) -> list[int | None]:
        """Exit codes by rank; what does not end in time is killed and fails the test."""
        for process in self.processes:
            process.join(seconds)
        alive = [process for process in self.processes if process.is_alive()]
        for process in alive:
            process.kill()
            process.join()
        assert not alive, f"{len(alive)} of {len(self.processes)} still ran after {seconds} s:\n{self.said()}"
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        """What all of them printed, by rank."""
        return "\n".join(
            f"--- process {rank}\n{path.read_text()}" for rank, path in enumerate(self.outputs) if path.exists()
        )


def start(function: Callable[..., None], *arguments: Any, size: int, folder: Path) -> Group:
    """Run `function(*arguments)` on `size` processes that find each other through the environment."""
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    outputs = [folder / f"output-{rank}.txt" for rank in range(size)]
    processes = [
        PROCESSES.Process(target=_main, args=(function, arguments, rank, size, port, outputs[rank]))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return Group(processes, outputs)


def spawn(function: Callable[..., None], *arguments: Any, size: int, folder: Path) -> None:
    """As `start`, and all of them have to end well."""
    group = start(function, *arguments, size=size, folder=folder)
    codes = group.wait()
    assert codes == [0] * size, f"exit codes {codes}\n{group.said()}"


def _main(
    function: Callable[..., None], arguments: Sequence[Any], rank: int, size: int, port: int, output: Path
) -> None:
    write_to(output)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)
    try:
        function(*arguments)
    except SystemExit:
        raise
    except BaseException:  # noqa: BLE001  told through the output and the exit code
        traceback.print_exc()
        sys.exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
