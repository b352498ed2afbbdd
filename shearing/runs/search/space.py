"""Uniform shapes near a budget, and a few of them that stand for all.

For each depth, width and number of heads there is one MLP size that spends the budget, the largest that stays within
it; so the shapes at a budget are a surface, and what is raced is a cover of it: every shape is near one that is.

Legend: L layers, d hidden, m intermediate, H query heads, K KV groups.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import PRUNED_BY
from shearing.runs.search.recipe import SearchRecipe

MOST_VALUES = 24
"""Values tried of one size: those of large models are thinned out evenly."""
MOST_HEADS = 6
_SHOWN = 3
_MOVES = 20

CostOf = Callable[[Shape], float]
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The values that each size may have, ascending.

    Attributes:
        layers, widths, mlps: of num_hidden_layers, hidden_size and intermediate_size.
        heads: pairs of query heads and KV groups, ascending.
    """

    layers: Sequence[int]
    widths: Sequence[int]
    mlps: Sequence[int]
    heads: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, search: SearchRecipe, *, source: Shape, granularities: Sequence[str]) -> Bounds:
        """What a recipe allows.

        Args:
            search: its section.
            source: sizes of the source model.
            granularities: that may be pruned, as in a recipe; other sizes stay the source's.
        """

        def open_(size: str) -> bool:
            return bool(set(PRUNED_BY[size]) & set(granularities))

        def values(size: str, shares: tuple[float, float], *, multiple: int) -> list[int]:
            whole = getattr(source, size)
            if not open_(size):
                return [whole]
            least, most = (_within(share, whole) for share in shares)
            found = [value for value in range(multiple, most + 1, multiple) if value >= least]
            # The source's own size is allowed whatever it is a multiple of.
            return [*found, whole] if most == whole and whole % multiple else found

        heads = [(source.num_attention_heads, source.num_key_value_heads)]
        if not search.keep_heads:
            groups = _counts(source.num_key_value_heads, search.heads, fixed=not open_("num_key_value_heads"))
            per_group = _counts(source.query_heads_per_group, (0.0, 1.0), fixed=not open_("query_heads_per_group"))
            least, most = (_within(share, source.num_attention_heads) for share in search.heads)
            heads = [(K * G, K) for K in groups for G in per_group if least <= K * G <= most]
        return cls(
            layers=_thinned(values("num_hidden_layers", search.layers, multiple=1), count=MOST_VALUES),
            widths=values("hidden_size", search.hidden, multiple=search.multiple_of),
            mlps=values("intermediate_size", search.mlp, multiple=search.multiple_of),
            heads=_thinned(sorted(heads), count=MOST_HEADS),
        )

    def shapes(self, source: Shape, *, accepts: Callable[[Shape], bool]) -> Iterator[Shape]:
        """Every depth, width and number of heads that an ordinary config can hold, with the source's MLP.

        Args:
            source: whose other sizes they have.
            accepts: whether a config can hold a shape; asked once for each width and number of heads.
        """
        for H, K in self.heads:
            of_heads = dataclasses.replace(source, num_attention_heads=H, num_key_value_heads=K)
            valid = [d for d in self.widths if accepts(dataclasses.replace(of_heads, hidden_size=d))]
            for d in _thinned(valid, count=MOST_VALUES):
                for L in self.layers:
                    yield dataclasses.replace(of_heads, hidden_size=d, num_hidden_layers=L)


@dataclass(frozen=True, kw_only=True)
class AtBudget:
    """Shapes and a budget.

    Attributes:
        fitting: those that spend it.
        below, above: where nothing fits exactly, those that come nearest, nearest first, with what they cost.
    """

    fitting: Sequence[Shape]
    below: Sequence[tuple[float, Shape]]
    above: Sequence[tuple[float, Shape]]


def shapes_at(
    budget: float,
    *,
    cost: CostOf,
    bounds: Bounds,
    source: Shape,
    tolerance: float,
    accepts: Callable[[Shape], bool],
) -> AtBudget:
    """The shapes that cost a budget, at most a share of it less.

    Args:
        budget: in the unit of `cost`.
        cost: of a shape; it rises with the MLP.
        bounds: values of each size.
        source: whose other sizes shapes have.
        tolerance: share of the budget that may be left.
        accepts: whether an ordinary config can hold a shape.
    """
    fitting, below, above = list[Shape](), list[tuple[float, Shape]](), list[tuple[float, Shape]]()
    for shape in bounds.shapes(source, accepts=accepts) if bounds.mlps else ():

        def with_mlp(m: int, shape: Shape = shape) -> Shape:
            return dataclasses.replace(shape, intermediate_size=m)

        index = bisect_right(bounds.mlps, budget, key=lambda m: cost(with_mlp(m)))
        if index == 0:
            smallest = with_mlp(bounds.mlps[0])
            above.append((cost(smallest), smallest))
            continue
        found = with_mlp(bounds.mlps[index - 1])
        spent = cost(found)
        if spent >= (1 - tolerance) * budget:
            fitting.append(found)
        else:
            below.append((spent, found))
    near = [sorted(each, key=lambda pair: abs(pair[0] - budget))[:_SHOWN] for each in (below, above)]
    return AtBudget(fitting=fitting, below=near[0], above=near[1])


def cover(shapes: Sequence[Shape], *, count: int, source: Shape) -> list[Shape]:
    """A few shapes such that each of the others is near one of them: no chance, the same list every time.

    Each number of heads has an equal part, however many widths divide by it. In a part, sizes are compared by their
    logarithms: from the shape in the middle on, the farthest from all so far is taken, again and again; then each moves
    to the middle of what is nearest to it (k-medoids), so that no place is spent on corners alone.

    Args:
        shapes: to choose among.
        count: how many at most.
        source: sizes that others are shares of.
    """
    by_heads: dict[tuple[int, int], list[Shape]] = {}
    for shape in shapes:
        by_heads.setdefault((shape.num_attention_heads, shape.num_key_value_heads), []).append(shape)
    # Most heads first: they get what does not divide.
    parts = [by_heads[heads] for heads in sorted(by_heads, reverse=True)]
    quotas = [0] * len(parts)
    while sum(quotas) < min(count, len(shapes)):
        for number, part in enumerate(parts):
            if quotas[number] < len(part) and sum(quotas) < count:
                quotas[number] += 1
    return [
        shape
        for part, quota in zip(parts, quotas, strict=True)
        if quota
        for shape in _spread(part, count=quota, source=source)
    ]


def _spread(shapes: Sequence[Shape], *, count: int, source: Shape) -> list[Shape]:
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size")
    places_NF = np.log([[getattr(shape, size) / getattr(source, size) for size in sizes] for shape in shapes])

    def distances(index: int) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = np.linalg.norm(places_NF - places_NF[index], axis=1)
        return found

    chosen = [int(np.linalg.norm(places_NF - places_NF.mean(axis=0), axis=1).argmin())]
    nearest_N = distances(chosen[0])
    while len(chosen) < count:
        chosen.append(int(nearest_N.argmax()))
        nearest_N = np.minimum(nearest_N, distances(chosen[-1]))
    for _ in range(_MOVES):
        owner_N = np.stack([distances(index) for index in chosen]).argmin(axis=0)
        moved = []
        for number in range(count):
            own = np.flatnonzero(owner_N == number)
            middle = places_NF[own].mean(axis=0)
            moved.append(int(own[np.linalg.norm(places_NF[own] - middle, axis=1).argmin()]))
        if moved == chosen:
            break
        chosen = moved
    return [shapes[index] for index in sorted(chosen)]


def memory_of(shape: Shape, *, batch_size: int, context: int, bytes_per_value: int) -> int:
    """Bytes of a model's weights, and of its KV cache: two vectors for each layer, KV group and token.

    Args:
        shape: of the model.
        batch_size: sequences.
        context: tokens of each.
        bytes_per_value: of the dtype.
    """
    cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * context * batch_size
    return bytes_per_value * (shape.num_parameters() + cache)


def _within(share: float, whole: int) -> int:
    """Of a bound: a share of a size in whole units, where rounding errors decide nothing."""
    return max(1, round(share * whole))


def _counts(whole: int, shares: tuple[float, float], *, fixed: bool) -> list[int]:
    least, most = (_within(share, whole) for share in shares)
    return [whole] if fixed else list(range(least, most + 1))


def _thinned(values: Sequence[_Value], *, count: int) -> list[_Value]:
    """At most so many values, evenly, with the first and the last."""
    if len(values) <= count:
        return list(values)
    places = [round(index * (len(values) - 1) / (count - 1)) for index in range(count)]
    return [values[place] for place in places]
