"""The map of kept units: one line per layer with its heads, its share of intermediate units, and the hidden dimensions.

Drawn by hand as SVG: one path per state, so that a model of 80 layers and 64 heads stays small.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from markupsafe import Markup
from torch import Tensor

MAX_BINS = 64
SHADES = 6
# In the units of the drawing: where the rows begin, height of a row, space between KV groups.
LEFT, TOP, ROW, GROUP_GAP = 26.0, 18.0, 10.0, 2.0

_RANKS = {"hidden": 1, "attention": 1, "mlp": 1, "kv_groups": 2, "query_heads": 3, "intermediate": 2, "experts": 2}


@dataclass(frozen=True)
class UnitMap:
    """The drawing and what it counts.

    Attributes:
        svg: the map.
        layers, num_layers: kept and all.
        hidden, num_hidden: kept and all residual dimensions; 0 where their mask is absent.
    """

    svg: Markup
    layers: int
    num_layers: int
    hidden: int
    num_hidden: int


def unit_map(masks: dict[str, Tensor]) -> UnitMap | None:
    """Draw which units final binary masks keep.

    Args:
        masks: any of `hidden` [d], `attention` [L], `mlp` [L], `kv_groups` [L, K], `query_heads` [L, K, G], and
            `intermediate` [L, m] or `experts` [L, E]; others are ignored, as units inside of experts.

    Returns:
        None when nothing in there has a layer.
    """
    kept = {name: mask > 0 for name, mask in masks.items() if name in _RANKS and mask.ndim == _RANKS[name]}
    by_layer = [mask for name, mask in kept.items() if name != "hidden"]
    if not by_layer:
        return None
    num_layers = by_layer[0].shape[0]
    every_layer = torch.ones(num_layers, dtype=torch.bool)
    attention, mlp = kept.get("attention", every_layer), kept.get("mlp", every_layer)
    heads = _heads(kept)

    drawing = _Drawing()
    right = LEFT if heads is None else _draw_heads(drawing, heads, attention=attention) + 14
    label = "experts" if "experts" in kept else "intermediate units"
    right = _draw_mlp(drawing, kept.get("experts", kept.get("intermediate")), mlp=mlp, left=right, label=label)
    for layer in range(num_layers):
        if layer % 5 == 0 or layer == num_layers - 1:
            drawing.text(LEFT - 5, TOP + layer * ROW + 7.5, str(layer), end=True)
    height = TOP + num_layers * ROW + 4.0
    if "hidden" in kept:
        drawing.text(LEFT, height + 12, "hidden dimensions, the same in every layer")
        _draw_bins(drawing, kept["hidden"], x=LEFT, y=height + 18, width=right - LEFT)
        height += 32
    return UnitMap(
        svg=drawing.svg(right + 2, height, label="Units kept in each layer"),
        layers=int((attention & mlp).sum()),
        num_layers=num_layers,
        hidden=int(kept["hidden"].sum()) if "hidden" in kept else 0,
        num_hidden=kept["hidden"].numel() if "hidden" in kept else 0,
    )


def _draw_heads(drawing: _Drawing, heads: Tensor, *, attention: Tensor) -> float:
    """Cells of every head, group by group; returns where they end."""
    num_layers, groups, per_group = heads.shape
    cell = min(9, max(3, 220 // (groups * per_group)))
    drawing.text(LEFT, 10, "heads")
    x = LEFT
    for group in range(groups):
        for head in range(per_group):
            for layer in range(num_layers):
                alive = bool(attention[layer] and heads[layer, group, head])
                drawing.cell(x, TOP + layer * ROW, cell - 1, ROW - 2, share=float(alive))
            x += cell
        x += GROUP_GAP
    return x - GROUP_GAP


def _draw_mlp(drawing: _Drawing, parts: Tensor | None, *, mlp: Tensor, left: float, label: str) -> float:
    """A strip per layer, all kept where only the sub-layer is masked; returns where the strips end."""
    width = 300 if left < 150 else 240
    drawing.text(left, 10, label if parts is not None else "MLP")
    for layer, alive in enumerate(mlp.tolist()):
        units = torch.ones(MAX_BINS) if parts is None else parts[layer]
        _draw_bins(drawing, units if alive else torch.zeros_like(units), x=left, y=TOP + layer * ROW, width=width)
    return left + width


def _draw_bins(drawing: _Drawing, alive: Tensor, *, x: float, y: float, width: float) -> None:
    shares = _bins(alive)
    for index, share in enumerate(shares):
        drawing.cell(x + index * width / len(shares), y, width / len(shares) - 0.6, ROW - 2, share=share)


def _heads(kept: dict[str, Tensor]) -> Tensor | None:
    """Kept query heads [L, K, G]; G is 1 where only whole groups are masked."""
    groups, query = kept.get("kv_groups"), kept.get("query_heads")
    if query is None:
        return None if groups is None else groups[:, :, None]
    return query if groups is None else query & groups[:, :, None]


def _bins(alive: Tensor) -> list[float]:
    """Share alive in consecutive bins of equal size but for the last."""
    size = -(-alive.numel() // MAX_BINS)
    return [float(chunk.float().mean()) for chunk in torch.split(alive, size)]


class _Drawing:
    """Cells collected by shade of their share, and labels."""

    def __init__(self) -> None:
        self._cells: dict[int, list[str]] = defaultdict(list)
        self._texts: list[str] = []

    def cell(self, x: float, y: float, width: float, height: float, *, share: float) -> None:
        # Round up: a bin with a single unit left is not shown as empty.
        shade = min(SHADES, -(-round(share * 1000) * SHADES // 1000))
        self._cells[shade].append(f"M{x:.4g} {y:.4g}h{width:.3g}v{height:.3g}h-{width:.3g}z")

    def text(self, x: float, y: float, text: str, *, end: bool = False) -> None:
        anchor = ' text-anchor="end"' if end else ""
        self._texts.append(f'<text x="{x:.4g}" y="{y:.4g}"{anchor}>{text}</text>')

    def svg(self, width: float, height: float, *, label: str) -> Markup:
        paths = [
            f'<path fill="var(--kept)" opacity="{shade / SHADES:.2f}" d="{"".join(cells)}"/>'
            if shade
            else f'<path fill="var(--gone)" d="{"".join(cells)}"/>'
            for shade, cells in sorted(self._cells.items())
        ]
        return Markup(  # noqa: S704 - numbers and our own words only
            f'<svg class="map" role="img" aria-label="{label}" viewBox="0 0 {width:.4g} {height:.4g}">'
            f"{''.join(paths)}{''.join(self._texts)}</svg>"
        )
