"""A picture of a race: a line for each contender, the best on top, a panel for each table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shearing.files.pictures import BLUE, GREY, GRID, MUTED, ORANGE, quiet_axes, save_picture
from shearing.runs.race.methods import LEARNED
from shearing.runs.race.results.tables import tables_of

REACH = 1.0
"""Nats behind the best that a panel shows: who is further behind stands at its edge, with the loss in figures."""

# Inches: of the dots of a panel, of a character of the names beside them, of a line, and of title and axis.
_DOTS, _CHARACTER, _LINE, _REST = 3.2, 0.062, 0.17, 0.8


def draw_race(results: Mapping[str, Any], *, path: Path) -> bool:
    """Draw the final losses of all contenders that have any.

    A dot is the mean over seeds on test text, its bar the standard error where there are several seeds, a ring the mean
    on text of no training domain; learned masks are orange.

    Args:
        results: content of results.json.
        path: of an SVG.

    Returns:
        Whether there was anything to draw; nothing is written otherwise.
    """
    panels = [(title, ran) for title, table in tables_of(results) if (ran := [r for r in table["rows"] if r["seeds"]])]
    if not panels:
        return False
    height = _REST + _LINE * max(len(rows) for _, rows in panels)
    width = sum(_DOTS + _CHARACTER * max(len(row["title"]) for row in rows) for _, rows in panels)
    settings: Any = {**quiet_axes(), "font.size": 8, "svg.hashsalt": "race", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False).ravel(), panels, strict=True):
            _panel(axes, sorted(rows, key=lambda row: -row["mean"]))
            axes.set_title(title, fontsize=8, loc="left")
        figure.supxlabel(
            "loss on test text, nats per token (ring: text of no training domain)", fontsize=8, color=MUTED
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(figure, path)
    return True


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Of rows by falling loss: the last is drawn on top."""
    edge = rows[-1]["mean"] + REACH
    for height, row in enumerate(rows):
        colour = ORANGE if row["method"] == LEARNED else BLUE
        if row["mean"] > edge:
            axes.plot([edge], [height], ">", color=colour, markersize=4, clip_on=False)
            axes.annotate(
                f"{row['mean']:.2f}",
                (edge, height),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=MUTED,
                fontsize=7,
                annotation_clip=False,
            )
            continue
        outside = row.get("outside_mean")
        if outside is not None and outside <= edge:
            axes.plot([outside], [height], "o", color=GREY, markersize=4, fillstyle="none", markeredgewidth=0.8)
        error = 0.0 if row["standard_deviation"] is None else row["standard_deviation"] / len(row["seeds"]) ** 0.5
        axes.errorbar([row["mean"]], [height], xerr=[error], fmt="o", color=colour, markersize=4, elinewidth=1.0)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlim(right=edge)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="both", color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
