"""A picture of a search: loss against size and against latency, a line for each round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from shearing.files.pictures import BLUE, GREY, GRID, MUTED, ORANGE, quiet_axes, save_picture
from shearing.settings.quantities import format_parameters, format_tokens

_WIDTH, _HEIGHT = 3.4, 2.8


def draw_search(results: Mapping[str, Any], *, path: Path) -> None:
    """Draw the losses of all candidates by round: a dot for each, orange for the one that has won.

    Args:
        results: content of results.json.
        path: of an SVG.
    """
    axes_of: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
        "parameters": lambda line: float(line["parameters"]),
        "memory, MB": lambda line: line["bytes"] / 1e6,
        "prompt, ms": lambda line: line.get("measured_ms", {}).get("prompt"),
        "next token, ms": lambda line: line.get("measured_ms", {}).get("next_token"),
    }
    shown = {
        label: value
        for label, value in axes_of.items()
        if any(value(line) is not None for line in results["candidates"])
    }
    settings: Any = {**quiet_axes(), "font.size": 8, "svg.hashsalt": "search", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(_WIDTH * len(shown), _HEIGHT), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(shown), squeeze=False, sharey=True).ravel()
        for panel, (label, value) in zip(panels, shown.items(), strict=True):
            _panel(panel, results, value=value)
            panel.set_xlabel(label)
        figure.supylabel("validation loss, nats per token", fontsize=8, color=MUTED)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(figure, path)


def _panel(axes: Axes, results: Mapping[str, Any], *, value: Callable[[Mapping[str, Any]], float | None]) -> None:
    rounds = len(results["rounds"])
    for number, each in enumerate(results["rounds"]):
        dots = {
            line["name"]: (x, line["rounds"][number]["validation"])
            for line in results["candidates"]
            if len(line["rounds"]) > number and (x := value(line)) is not None
        }
        if not dots:
            continue
        strength = 0.35 + 0.65 * (number + 1) / rounds
        axes.plot(
            [x for x, _ in dots.values()],
            [y for _, y in dots.values()],
            "o",
            color=BLUE if number == rounds - 1 else GREY,
            alpha=strength,
            markersize=4,
        )
        if results["winner"] in dots:
            x, y = dots[results["winner"]]
            axes.plot([x], [y], "o", color=ORANGE, markersize=5)
        axes.annotate(
            format_tokens(each["tokens"]),
            max(dots.values()),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=MUTED,
            fontsize=7,
        )
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_parameters(x) if x >= 1e5 else f"{x:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.12)
