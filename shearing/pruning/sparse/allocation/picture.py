"""A picture of an allocation: level by layer with what it rests on beside it, and the search by generation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from shearing.files.pictures import BLUE, GREY, GRID, INK, MUTED, ORANGE, quiet_axes, save_picture
from shearing.pruning.sparse.allocation.file import StoredAllocation

FILE_NAME = "allocation.png"
_LEVEL, _SCORE, _RIVAL = BLUE, ORANGE, GREY
_SCORE_NAMES = {
    "rank": "Fisher trace",
    "msp": "Fisher trace",
    "owl": "outliers",
    "alpha": "tail exponent",
    "depth": "depth",
}
_LABEL_HEIGHT = 0.055  # of a rule's name, as a share of the panel
_LAYER = re.compile(r"\.(\d+)\.")


def draw_allocation(allocation: StoredAllocation, *, path: Path) -> None:
    """Draw the sparsity of every unit, its score beside it, and best fitness by generation where there was a search.

    Units that are matrices are drawn as a map of matrix by layer.

    Args:
        allocation: what to draw.
        path: .png, .svg or .pdf.
    """
    facts = allocation.content["facts"]
    history = facts.get("history")
    settings: Any = {**quiet_axes(), "ytick.minor.size": 0, "font.size": 8, "svg.hashsalt": "allocation"}
    with matplotlib.rc_context(settings):
        by_matrix = allocation.content["unit"] == "matrix"
        panels = 1 + (not by_matrix and bool(facts.get("scores"))) + bool(history)
        figure = Figure(figsize=(7.2, 2.1 * panels + (0.8 if by_matrix else 0.0)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = iter(figure.subplots(panels, 1, squeeze=False).ravel())
        if by_matrix:
            _draw_map(next(axes), allocation, figure=figure)
        else:
            _draw_levels(next(axes), allocation)
            if facts.get("scores"):
                _draw_scores(next(axes), allocation)
        if history:
            _draw_history(next(axes), allocation)
        save_picture(figure, path)


def _draw_levels(axes: Axes, allocation: StoredAllocation) -> None:
    layers: dict[int, str] = {}
    for name, level in allocation.patterns.items():
        layers[_layer(name)] = str(level)
    sparsity = {_layer(name): float(1 - level.density) for name, level in allocation.patterns.items()}
    axes.bar(list(sparsity), list(sparsity.values()), color=_LEVEL, width=0.8)
    axes.set_xlim(min(sparsity) - 0.7, max(sparsity) + 0.7)
    few = len(set(layers.values())) <= 16
    for layer, share in sparsity.items():
        if few and len(sparsity) <= 40:
            axes.annotate(
                layers[layer],
                (layer, share),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=5.5,
                color=MUTED,
            )
    mean = float(1 - allocation.budget)
    axes.axhline(mean, color=_RIVAL, linewidth=0.8, linestyle=(0, (4, 2)))
    axes.set_ylim(0.0, min(1.0, 1.15 * max(sparsity.values())))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _finish(axes, title="weights removed, N:M is N kept of M", label="decoder layer")


def _draw_scores(axes: Axes, allocation: StoredAllocation) -> None:
    scores = {_layer(f".{unit.removeprefix('layer ')}."): value for unit, value in _scores(allocation).items()}
    axes.bar(list(scores), list(scores.values()), color=_SCORE, width=0.8)
    axes.set_xlim(min(scores) - 0.7, max(scores) + 0.7)
    positive = [value for value in scores.values() if value > 0]
    if len(positive) == len(scores) and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    name = str(allocation.content["allocation"])
    _finish(axes, title=_SCORE_NAMES.get(name, "score"), label="decoder layer")


def _draw_map(axes: Axes, allocation: StoredAllocation, *, figure: Figure) -> None:
    kinds = list(dict.fromkeys(_kind(name) for name in allocation.patterns))
    layers = sorted({_layer(name) for name in allocation.patterns})
    sparsity = np.full((len(kinds), len(layers)), np.nan)
    for name, level in allocation.patterns.items():
        sparsity[kinds.index(_kind(name)), layers.index(_layer(name))] = float(1 - level.density)
    image = axes.imshow(sparsity, aspect="auto", cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_yticks(range(len(kinds)), kinds)
    step = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, decimals=0), pad=0.01)
    axes.set_title("weights removed", fontsize=9, loc="left", color=INK)
    axes.set_xlabel("decoder layer")


def _draw_history(axes: Axes, allocation: StoredAllocation) -> None:
    facts = allocation.content["facts"]
    generations = [each["generation"] for each in facts["history"]]
    axes.plot(generations, [each["best"] for each in facts["history"]], color=_LEVEL, linewidth=1.6, label="best")
    axes.plot(
        generations,
        [each["mean"] for each in facts["history"]],
        color=_LEVEL,
        linewidth=0.9,
        alpha=0.4,
        label="mean of survivors",
    )
    others = {name: value for name, value in facts["fitness"].items() if name != "msp"}
    for value in others.values():
        axes.axhline(value, color=_RIVAL, linewidth=0.8, linestyle=(0, (4, 2)))
    low, high = axes.get_ylim()
    place = low
    for name, value in sorted(others.items(), key=lambda item: item[1]):
        place = max(value, place + _LABEL_HEIGHT * (high - low))
        axes.annotate(
            name,
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=6.5,
            color=_RIVAL,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=7, loc="lower left")
    _finish(axes, title=f"fitness: {facts.get('fitness_kind', 'loss')} on text of the search", label="generation")


def _finish(axes: Axes, *, title: str, label: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", color=INK)
    axes.set_xlabel(label)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _scores(allocation: StoredAllocation) -> dict[str, float]:
    scores: dict[str, float] = allocation.content["facts"]["scores"]
    return scores


def _layer(name: str) -> int:
    found = _LAYER.search(name)
    assert found is not None, name
    return int(found[1])


def _kind(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
