"""What a run has written, as series to draw. Everything may be absent: a run is looked at while it is under way."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Colour = Literal["ink", "muted", "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7"]
SERIES_COLOURS: tuple[Colour, ...] = ("s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7")
MAX_POINTS = 300


@dataclass(frozen=True)
class Series:
    """A line of a chart; x in tokens.

    Attributes:
        colour: name of a colour of the page, which differs between light and dark.
        steps: the value holds until the next point.
        faint: drawn thin and pale, as the noise behind another line.
    """

    label: str
    x: list[float]
    y: list[float]
    colour: Colour = "s0"
    dashed: bool = False
    steps: bool = False
    faint: bool = False


@dataclass(frozen=True)
class StageMetrics:
    """metrics.jsonl of one stage: its steps, and mixture updates and validation losses in their order.

    Each has `tokens`, counted over the whole run; losses that nothing followed are called `validation`.
    """

    name: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    updates: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last_tokens(self) -> float:
        return float(self.steps[-1]["tokens"]) if self.steps else 0.0


def read_stages(folders: Mapping[str, Path]) -> list[StageMetrics]:
    """Read the metrics of stages that follow each other, on one tokens axis.

    Args:
        folders: path of metrics.jsonl by stage name, in order; a file may be absent.

    Returns:
        One entry per stage, empty where nothing was written. A line cut off by a crash is skipped.
    """
    stages: list[StageMetrics] = []
    offset = 0.0
    for name, path in folders.items():
        stage = StageMetrics(name)
        last = offset
        for line in _lines(path):
            if "event" in line:
                # An event follows the line of its step, and says no tokens of its own.
                if line["event"] == "mixture":
                    stage.updates.append({**line, "tokens": last})
                elif line["event"] == "validation":
                    stage.updates.append({"validation": line.get("losses"), "tokens": last})
            elif isinstance(line.get("tokens"), int | float):
                last = offset + line["tokens"]
                stage.steps.append({**line, "tokens": last})
        offset = last
        stages.append(stage)
    return stages


def series_of(
    stages: Sequence[StageMetrics], *, read: Callable[[dict[str, Any]], Any], updates: bool = False
) -> tuple[list[float], list[float]]:
    """Tokens and values over all stages, where `read` gives a finite number.

    Args:
        stages: metrics in order.
        read: takes a line of the metrics; anything but a finite number is left out.
        updates: read the mixture updates instead of the steps.
    """
    x, y = [], []
    for stage in stages:
        for line in stage.updates if updates else stage.steps:
            value = read(line)
            if isinstance(value, int | float) and math.isfinite(value):
                x.append(float(line["tokens"]))
                y.append(float(value))
    return x, y


def downsample(x: Sequence[float], y: Sequence[float], *, points: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Means of consecutive points, at most `points` of them; short series come back as they are."""
    if len(x) <= points:
        return list(x), list(y)
    bounds = [round(index * len(x) / points) for index in range(points + 1)]
    pairs = list(itertools.pairwise(bounds))
    return (
        [sum(x[start:end]) / (end - start) for start, end in pairs],
        [sum(y[start:end]) / (end - start) for start, end in pairs],
    )


def smooth(y: Sequence[float], *, window: int) -> list[float]:
    """Mean of the values up to `window // 2` places before and after each one."""
    sums = [0.0, *itertools.accumulate(y)]
    half = window // 2
    bounds = ((max(0, index - half), min(len(y), index + half + 1)) for index in range(len(y)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in bounds]


def nested(name: str, key: str) -> Callable[[dict[str, Any]], Any]:
    """Reads `line[name][key]`, None where either is absent."""

    def read(line: dict[str, Any]) -> Any:
        inner = line.get(name)
        return inner.get(key) if isinstance(inner, dict) else None

    return read


def keys_of(stages: Sequence[StageMetrics], name: str, *, updates: bool = False) -> list[str]:
    """Every key that the dictionaries called `name` have, in order of appearance."""
    keys: dict[str, None] = {}
    for stage in stages:
        for line in stage.updates if updates else stage.steps:
            if isinstance(line.get(name), dict):
                keys.update(dict.fromkeys(line[name]))
    return list(keys)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line
