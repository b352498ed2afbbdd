"""The rows of units in which masks are tried: how many of a row stay, and what a search begins with.

Legend: n units of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import Granularity, granularities_of, unit_sizes
from shearing.pruning.structured.rounding import every_granularity


def searched(source: Shape, *, target: Shape | None) -> tuple[Granularity, ...]:
    """What loses units, each with how many of a row stay; without a target half of every row, rounded up."""
    if target is not None:
        return granularities_of(every_granularity(source), source=source, target=target)
    sizes = {name: unit_sizes(source)[name] for name in every_granularity(source)}
    return tuple(Granularity(name, size, size[-1] - size[-1] // 2) for name, size in sizes.items() if size[-1] > 1)


def ranks(scores: Tensor, *, ties: Tensor | None = None) -> Tensor:
    """Rank of each unit in its row from 0, the lowest, fp32 of the scores' shape; among equals the higher of `ties`."""
    order = (torch.zeros_like(scores) if ties is None else ties).argsort(dim=-1, stable=True)
    order = order.gather(-1, scores.gather(-1, order).argsort(dim=-1, stable=True))
    return order.argsort(dim=-1).float()


def with_sum(values: Tensor, *, total: float, low: float, high: float) -> Tensor:
    """Values of each row shifted by one number and clamped, so that they sum up to `total`.

    Args:
        values: [..., n].
        total: from n * low to n * high.
        low, high: bounds of what is returned.
    """
    down, up = values.amin(-1, keepdim=True) - high, values.amax(-1, keepdim=True) - low
    for _ in range(50):
        shift = (down + up) / 2
        too_much = (values - shift).clamp(low, high).sum(-1, keepdim=True) > total
        down, up = torch.where(too_much, shift, down), torch.where(too_much, up, shift)
    return (values - up).clamp(low, high)


def at_most(values: Tensor, *, total: float, low: float, high: float) -> Tensor:
    """Values clamped; rows whose sum is then above `total` as `with_sum` has them. Arguments are its."""
    clamped = values.clamp(low, high)
    over = clamped.sum(-1, keepdim=True) > total
    return torch.where(over, with_sum(values, total=total, low=low, high=high), clamped)
