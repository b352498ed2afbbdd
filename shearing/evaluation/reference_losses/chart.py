"""A picture of loss against size: the models measured, the law through them, and the size asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from shearing.errors import ShearingError
from shearing.evaluation.reference_losses.fit import DomainFit, ReferenceFit
from shearing.files.pictures import BLUE, GRID, INK, MUTED, ORANGE, quiet_axes, save_picture
from shearing.settings.quantities import format_tokens

SUFFIXES = (".png", ".svg", ".pdf")
_LINE, _POINT, _FREE = BLUE, INK, ORANGE
_COLUMNS = 4


def require_picture(path: Path) -> None:
    """Raise `ShearingError` unless the file's suffix is that of a picture."""
    if path.suffix.lower() not in SUFFIXES:
        raise ShearingError(
            "--picture", value=str(path), allowed=f"a file that ends in {', '.join(SUFFIXES)}", mend="rename it"
        )


def draw_laws(fit: ReferenceFit, *, path: Path) -> None:
    """Draw one panel a domain: points, the law, the prediction (hollow), and the unbounded law where it differs.

    Args:
        fit: what to draw.
        path: .png, .svg or .pdf; its folder is made.

    Raises:
        ShearingError: another suffix.
    """
    require_picture(path)
    columns = min(_COLUMNS, len(fit.domains))
    rows = math.ceil(len(fit.domains) / columns)
    settings: Any = {**quiet_axes(), "xtick.minor.size": 0, "font.size": 8, "svg.hashsalt": "laws"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(2.5 * columns, 2.0 * rows + 0.4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, (name, each) in zip(panels, fit.domains.items(), strict=False):
            _panel(panel, each, name=name, fit=fit)
        for panel in panels[len(fit.domains) :]:
            panel.set_axis_off()
        figure.supxlabel("parameters, embeddings included", fontsize=8, color=MUTED)
        figure.supylabel("held-out loss, nats per token", fontsize=8, color=MUTED)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(figure, path)


def _panel(axes: Axes, each: DomainFit, *, name: str, fit: ReferenceFit) -> None:
    sizes = [row.parameters for row in fit.table.rows]
    low, high = min([*sizes, fit.parameters]), max([*sizes, fit.parameters])
    along = np.geomspace(low / 1.15, high * 1.15, 100)
    axes.plot(along, [each.law.at(size) for size in along], color=_LINE, linewidth=1.4)
    if each.unbounded is not None:
        axes.plot(along, [each.unbounded.at(size) for size in along], color=_FREE, linewidth=1.0, linestyle=(0, (4, 2)))
        axes.annotate("dashed: c free", (0.98, 0.72), xycoords="axes fraction", ha="right", color=_FREE, fontsize=7)
    axes.plot(sizes, [row.losses[name] for row in fit.table.rows], "o", color=_POINT, markersize=4)
    axes.plot([fit.parameters], [each.predicted], "o", color=_LINE, markerfacecolor="white", markersize=5.5)
    axes.annotate(
        f"{each.predicted:.3f}",
        (fit.parameters, each.predicted),
        xytext=(6, 3),
        textcoords="offset points",
        color=_LINE,
    )
    axes.set_title(name, fontsize=9, loc="left", color=INK)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,)) if high / low > 20 else LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tokens(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
