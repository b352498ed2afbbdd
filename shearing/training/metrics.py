"""What a run says while it goes: metrics.jsonl, and the live view on a terminal (plain lines elsewhere)."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from typing_extensions import Self

from shearing.files.durable import flush_folder
from shearing.progress import PLAIN_SECONDS, activity, clock, max_memory

logger = logging.getLogger(__name__)

TIMING_FIELDS = frozenset(
    {"seconds", "tokens_per_second", "tokens_per_second_per_gpu", "mfu", "data_wait", "max_memory"}
)
"""Fields of metrics.jsonl that differ between two runs of the same recipe."""


class MetricsLog:
    """metrics.jsonl: one JSON object per line, cut back on resume to what the checkpoint had seen.

    Args:
        path: the file; its folder is made.
        num_bytes: size at the checkpoint that is continued from, 0 at the start: whatever follows is dropped, so
            lines of steps that will be computed again, or half a line, leave neither gap nor repeat.
    """

    def __init__(self, path: Path, *, num_bytes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        size = path.stat().st_size
        if size < num_bytes:
            logger.warning("%s is shorter than when the checkpoint was written: lines are missing from it", path)
        os.truncate(path, min(num_bytes, size))
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        flush_folder(path.parent)

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines that are there; what is left of one that was cut off is passed over."""
        with self._path.open(encoding="utf-8") as file:
            for line in file:
                with suppress(ValueError):
                    yield json.loads(line)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; figures that are not finite become null."""
        self._file.write(json.dumps(_finite(record)) + "\n")
        self._file.flush()

    def sync(self) -> int:
        """Force the file to disk; returns its size in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass
class StageTotals:
    """Figures of a stage, for the summary, over all starts of it; seconds are wall time, without checkpoints."""

    seconds: float = 0.0
    heldout_seconds: float = 0.0
    data_wait: float = 0.0
    tokens: int = 0
    skipped: int = 0
    losses: list[float] = field(default_factory=list)
    peak_memory: int = 0
    mfu: float | None = None

    def add(self, record: Mapping[str, Any], *, tokens: int) -> None:
        """Count a line of metrics.jsonl; a step of it trained on `tokens` tokens."""
        if "event" in record:
            self.heldout_seconds += record["seconds"] if record["event"] in ("mixture", "validation") else 0.0
            return
        self.seconds += record["seconds"]
        self.data_wait += record["data_wait"]
        self.tokens += tokens
        self.skipped = record["skipped"]
        self.losses.append(math.nan if record["loss"] is None else record["loss"])
        self.peak_memory = max(self.peak_memory, record["max_memory"])
        self.mfu = record["mfu"]


class Display:
    """Progress of one stage: a live panel on a terminal, a line every few seconds elsewhere.

    Args:
        name: the stage.
        total_steps: length of the stage.
        done_steps: steps done before this process began.
        console: where to write.
    """

    def __init__(self, name: str, *, total_steps: int, done_steps: int, console: Console) -> None:
        self._name, self._total_steps, self._console = name, total_steps, console
        self._step = self._done_steps = done_steps
        self._started = self._last_line = time.monotonic()
        self._record: Mapping[str, Any] = {}
        self._heldout: Mapping[str, Any] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[time]}"),
            console=console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task(name, total=total_steps, completed=done_steps, time="")
        self._live = Live(get_renderable=self._panel, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, record: Mapping[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        if "event" in record:
            # What domain weights follow has its place until the next update.
            if record["event"] == "mixture" or (record["event"] == "validation" and "reference" not in self._heldout):
                self._heldout = record
            return
        self._record, self._step = record, int(record["step"])
        self._progress.update(self._task, completed=self._step)
        due = time.monotonic() - self._last_line >= PLAIN_SECONDS
        if not self._console.is_terminal and (due or self._step == self._total_steps):
            self._last_line = time.monotonic()
            self._console.print(self._line(), soft_wrap=True, highlight=False)

    @contextmanager
    def activity(self, name: str, *, total: int) -> Iterator[Callable[[int], None]]:
        """As `activity`, inside the live view."""
        if not self._console.is_terminal:
            with activity(f"{self._name}: {name}", total=total, console=self._console) as advance:
                yield advance
            return
        task = self._progress.add_task(name, total=total, time="")
        try:
            yield lambda tokens: self._progress.advance(task, tokens)
        finally:
            self._progress.remove_task(task)

    def seconds_left(self) -> float | None:
        """Estimate from this process's own pace, evaluations and checkpoints included; None before there is one."""
        done = self._step - self._done_steps
        if not done:
            return None
        return (time.monotonic() - self._started) / done * (self._total_steps - self._step)

    def _line(self) -> str:
        record = self._record
        parts = [
            f"{self._name} {self._step}/{self._total_steps} ({100 * self._step / self._total_steps:.0f}%)",
            f"{clock(self.seconds_left())} left",
            f"loss {_figure(record['loss'])}",
            f"{record['tokens_per_second']:.0f} tok/s" + _mfu(record["mfu"], before=", "),
        ]
        if record["skipped"]:
            parts.append(f"skipped {record['skipped']}")
        sizes = [
            f"{name} {_size(size)}/{_size(record['target'].get(name))}" for name, size in record["expected"].items()
        ]
        if record["violation"]:
            sizes.append(f"off by at most {100 * max(record['violation'].values()):.2g}%")
        weights = [f"{domain} {weight:.3f}" for domain, weight in record["weights"].items()]
        return " · ".join(parts) + "".join(f" | {' '.join(group)}" for group in (sizes, weights) if group)

    def _panel(self) -> Group:
        elapsed = time.monotonic() - self._started
        self._progress.update(self._task, time=f"{clock(elapsed)} gone, {clock(self.seconds_left())} left")
        record = self._record
        if not record:
            return Group(self._progress)
        figures = (
            f"loss [bold]{_figure(record['loss'])}[/]   {record['tokens_per_second']:.0f} tokens/s   "
            f"{_mfu(record['mfu'], after='   ')}"
            f"learning rate {record['learning_rate']:.2e}   gradient norm {_figure(record['grad_norm'])}   "
            f"skipped {record['skipped']}"
        )
        return Group(self._progress, figures, *self._tables())

    def _tables(self) -> Iterator[Table]:
        record = self._record
        if record["expected"]:
            table = Table("granularity", "expected", "target", "violation", box=None, pad_edge=False)
            for name, size in record["expected"].items():
                violation = record["violation"].get(name)
                table.add_row(name, _size(size), _size(record["target"].get(name)), _figure(violation))
            yield table
        kind = "mean training loss" if self._heldout.get("losses_from") == "training" else "held-out loss"
        table = Table("domain", "weight", kind, "reference", box=None, pad_edge=False)
        for domain, weight in record["weights"].items():
            loss = self._heldout.get("losses", {}).get(domain)
            reference = self._heldout.get("reference", {}).get(domain)
            table.add_row(domain, f"{weight:.3f}", _figure(loss), _figure(reference))
        yield table


def print_summary(name: str, totals: StageTotals, *, console: Console, rows: Mapping[str, str]) -> None:
    """Print what a stage did.

    Args:
        name: the stage.
        totals: of the stage.
        console: where to write.
        rows: further rows of the table.
    """
    table = Table(title=f"{name} complete", show_header=False, title_justify="left")
    wall = totals.seconds + totals.heldout_seconds
    if totals.losses:
        tenth = max(1, len(totals.losses) // 10)
        table.add_row("loss, first and last tenth", f"{_mean(totals.losses[:tenth])} → {_mean(totals.losses[-tenth:])}")
        table.add_row("tokens", f"{totals.tokens:,} at {totals.tokens / max(totals.seconds, 1e-9):,.0f} tokens/s")
        table.add_row(
            "time, without checkpoints",
            f"{clock(wall)}, of which {_share(totals.heldout_seconds, wall)} held-out losses",
        )
        table.add_row("waited for data", _share(totals.data_wait, wall))
        table.add_row("skipped steps", str(totals.skipped))
        if totals.mfu is not None:
            table.add_row("MFU, last steps", f"{100 * totals.mfu:.1f} %")
    peak = max(totals.peak_memory, max_memory())
    table.add_row("peak memory of a process", f"{peak / 1e9:.2f} GB")
    for label, value in rows.items():
        table.add_row(label, value)
    console.print(table)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _mfu(value: float | None, *, before: str = "", after: str = "") -> str:
    return "" if value is None else f"{before}MFU {100 * value:.1f}%{after}"


def _size(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")


def _mean(values: list[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"{sum(finite) / len(finite):.3f}" if finite else "–"


def _share(part: float, whole: float) -> str:
    return f"{clock(part)} ({100 * part / max(whole, 1e-9):.1f} %)"
