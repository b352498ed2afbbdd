"""What a user sees while something takes long: a bar with the time left, or a line now and then."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0
"""Between two lines where there is no terminal for a bar."""


@contextmanager
def activity(name: str, *, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Show a task of `total` tokens or layers outside training: a bar on a terminal, else a line every few seconds.

    Yields:
        What to call with the number just done.
    """
    if console.is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as progress:
            task = progress.add_task(name, total=total)
            yield lambda tokens: progress.advance(task, tokens)
        return
    started = last_line = time.monotonic()
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done, last_line
        done += tokens
        now = time.monotonic()
        if now - last_line >= PLAIN_SECONDS:
            last_line = now
            # Of less than a hundredth, which may have begun slowly, it would be off by hours.
            left = (now - started) / done * (total - done) if 100 * done >= total else None
            console.print(f"{name} ({100 * done / total:.0f}%) · {clock(left)} left", soft_wrap=True, highlight=False)

    yield advance


def quiet_deepspeed() -> None:
    """Keep DeepSpeed from saying, on every machine without a GPU, that it has none.

    transformers imports it where it is installed, also where nothing is trained with it.
    """
    logging.getLogger("DeepSpeed").addFilter(_not_about_accelerators)


def _not_about_accelerators(record: logging.LogRecord) -> bool:
    return "Setting accelerator" not in record.getMessage()


def max_memory() -> int:
    """Peak memory of this process in bytes since `reset_max_memory`: the GPU's where there is one, else resident."""
    import torch  # late: a bar needs none

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_max_memory() -> None:
    """Begin a new peak at what is held now; the peak of resident memory stays where the system has no such thing."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def clock(seconds: float | None) -> str:
    """A time as people read it: 0:07, 1:02:03; dashes where it is not known."""
    if seconds is None:
        return "–:––"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
