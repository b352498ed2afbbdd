"""Pictures as files: the colours and quiet axes of the report's light page, and the same bytes each time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1a2029", "#667080", "#e3e7ec"
BLUE, ORANGE, GREY = "#2563a8", "#d9730d", "#75808d"
"""Of lines and bars, the first before the second; grey for what these are compared with."""

_DOTS_PER_INCH = 150


def quiet_axes(*, ink: str = INK, muted: str = MUTED, grid: str = GRID) -> dict[str, Any]:
    """Settings of matplotlib for axes without major ticks and without a frame.

    Args:
        ink, muted, grid: colours of titles, of labels, and of what lies behind the lines.
    """
    return {
        "axes.edgecolor": grid,
        "axes.labelcolor": muted,
        "text.color": ink,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
    }


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure to a file whose suffix says the kind; an SVG without its date, so that it can be compared."""
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    figure.savefig(path, dpi=_DOTS_PER_INCH, metadata=metadata)
