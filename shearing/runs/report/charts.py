"""Charts as inline SVG whose colours are the page's CSS variables, so that one drawing serves light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from shearing.files.pictures import quiet_axes
from shearing.runs.report.series import SERIES_COLOURS, Series
from shearing.settings.quantities import format_tokens

PAINTS = {"ink": "#010203", "muted": "#020304", "grid": "#030405"} | {
    name: f"#a0b0{index:02x}" for index, name in enumerate(SERIES_COLOURS)
}
"""Colours that occur nowhere else, replaced by CSS variables once the SVG is written."""

WIDE = (4.7, 2.35)
SMALL = (2.45, 1.45)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    size: tuple[float, float] = WIDE,
    marks: Sequence[tuple[float, str]] = (),
    zero: bool = False,
    log: bool = False,
) -> Markup:
    """Draw lines over tokens.

    Args:
        series: lines; empty ones are left out.
        title: what the chart shows, for those who cannot see it.
        size: inches; `WIDE` for a chart of its own, `SMALL` for one of many.
        marks: (tokens, text) of vertical lines.
        zero: let the vertical axis begin at zero.
        log: logarithmic vertical axis.

    Returns:
        An `<svg>` element without external references.
    """
    small = size == SMALL

    def draw(axes: Axes) -> None:
        for line in series:
            _draw(axes, line, small=small)
        if log:
            axes.set_yscale("log")
        elif zero:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.grid(axis="y", color=PAINTS["grid"], linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(3 if small else 5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tokens(value)))
        if not log:
            axes.yaxis.set_major_locator(MaxNLocator(4 if small else 5))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
        axes.margins(x=0.01)
        if not small:
            axes.set_xlabel("tokens")
        for tokens, text in marks:
            axes.axvline(tokens, color=PAINTS["muted"], linewidth=0.8, linestyle=(0, (2, 2)))
            axes.annotate(
                text,
                (tokens, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 1),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color=PAINTS["muted"],
            )

    return drawing(draw, title=title, size=size)


def drawing(draw: Callable[[Axes], None], *, title: str, size: tuple[float, float]) -> Markup:
    """What a function draws into axes, in the colours of the page.

    Args:
        draw: draws, with colours of `PAINTS`.
        title: what the chart shows, for those who cannot see it.
        size: inches.

    Returns:
        An `<svg>` element without external references.
    """
    settings: Any = {
        **quiet_axes(ink=PAINTS["ink"], muted=PAINTS["muted"], grid=PAINTS["grid"]),
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.size": 7.5 if size == SMALL else 8.5,
        "path.simplify": True,
        "path.simplify_threshold": 0.5,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        canvas: Any = FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        file = io.StringIO()
        canvas.print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(file.getvalue(), title=title)


def _draw(axes: Axes, line: Series, *, small: bool) -> None:
    if not line.x:
        return
    axes.plot(
        line.x,
        line.y,
        color=PAINTS[line.colour],
        linewidth=0.6 if line.faint else 1.2 if small or line.dashed else 1.5,
        alpha=0.4 if line.faint else 1.0,
        linestyle=(0, (4, 2)) if line.dashed else "-",
        drawstyle="steps-post" if line.steps else "default",
        marker="o" if len(line.x) == 1 else "",
        markersize=3,
        solid_joinstyle="round",
    )


def _inline(svg: str, *, title: str) -> Markup:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    # Only clip paths and markers are referred to, by hashes of title and content; other ids are the same in each chart.
    referred = set(re.findall(r"#([^\")]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in referred else "", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for name, colour in PAINTS.items():
        svg = svg.replace(colour, f"var(--{name})")
    view_box = re.search(r'viewBox="([^"]*)"', svg)
    assert view_box is not None
    body = re.sub(r"\s*\n\s*", "\n", svg[svg.index(">") + 1 :])
    head = f'<svg class="chart" role="img" aria-label="{escape(title)}" viewBox="{view_box[1]}">'
    return Markup(head + body)  # noqa: S704 - written by matplotlib, which escapes the text it is given
