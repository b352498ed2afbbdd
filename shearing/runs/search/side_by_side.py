"""Several processes of this machine on one search: each with a device, or a share of the cores, of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

import torch

from shearing.errors import ShearingError
from shearing.training.stage import INTERRUPTED_EXIT_CODE

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def require_processes(count: int) -> None:
    """Check that so many processes can be started here.

    Raises:
        ShearingError: fewer than one, or a launcher has started this process already.
    """
    if count < 1 or "WORLD_SIZE" in os.environ:
        raise ShearingError(
            "--processes",
            value=count if count < 1 else f"{count}, under a launcher (WORLD_SIZE is set)",
            allowed="at least 1, without a launcher: each process takes candidates by itself",
            mend="start `shear search` as it is; on other machines that see the folder: the same command with --join",
        )


def run_side_by_side(arguments: Sequence[str], *, processes: int) -> int:
    """Run `shear ARGUMENTS` so many times and wait for all; signals are passed on.

    Args:
        arguments: of the program, with `--join`.
        processes: how many.

    Returns:
        Exit code: 75 where a signal has stopped them, else that of the first that failed; 0 if none did.
    """
    started = [
        subprocess.Popen([sys.executable, "-m", "shearing", *arguments], env=_environment(index, of=processes))
        for index in range(processes)
    ]

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        codes = [process.wait() for process in started]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    failed = [code if code > 0 else 128 - code for code in codes if code]
    return INTERRUPTED_EXIT_CODE if INTERRUPTED_EXIT_CODE in failed else next(iter(failed), 0)


def _environment(index: int, *, of: int) -> dict[str, str]:
    devices = torch.cuda.device_count()
    if not devices:
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // of)), **os.environ}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(each) for each in range(devices)]
    return {**os.environ, "CUDA_VISIBLE_DEVICES": names[index % len(names)]}
