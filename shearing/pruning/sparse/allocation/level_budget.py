"""Budgets: levels for units of different sizes whose mean density, weighed by parameters, is a given one exactly.

Densities are fractions, so weights kept are counted in multiples of a common quantum, and which counts can be reached
is a matter of integers. Legend: U units, V levels, K quanta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from shearing.errors import ShearingError
from shearing.pruning.sparse.allocation.allocator import Unit
from shearing.pruning.sparse.patterns import Pattern

Costs = NDArray[np.float64]

MOST_CELLS = 1 << 28
"""Of the table that an optimum is read from, 2 GB."""


@dataclass(frozen=True)
class Grid:
    """What the levels keep of each unit, in whole quanta.

    Attributes:
        quantum: weights (a fraction of one, for levels that divide no unit).
        kept: [U][V], quanta that a level keeps of a unit.
        size: quanta of all units when dense.
    """

    quantum: Fraction
    kept: tuple[tuple[int, ...], ...]
    size: Fraction

    @classmethod
    def of(cls, units: Sequence[Unit], *, levels: Sequence[Pattern]) -> Grid:
        """The coarsest grid on which everything is whole."""
        exact = [[level.density * unit.size for level in levels] for unit in units]
        values = [value for of_unit in exact for value in of_unit]
        denominator = math.lcm(*(value.denominator for value in values))
        numerator = math.gcd(*(int(value * denominator) for value in values))
        quantum = Fraction(numerator, denominator)
        kept = tuple(tuple(int(value / quantum) for value in of_unit) for of_unit in exact)
        return cls(quantum, kept, sum(unit.size for unit in units) / quantum)

    def total(self, choice: Sequence[int]) -> int:
        """Quanta that a choice of levels keeps; U indices."""
        return sum(of_unit[level] for of_unit, level in zip(self.kept, choice, strict=True))

    def density(self, total: int) -> Fraction:
        """Share of the weights that so many quanta are."""
        return total / self.size


def nearest_budget(units: Sequence[Unit], *, levels: Sequence[Pattern], budget: Fraction) -> Fraction:
    """The reachable mean density that is nearest to `budget`; the sparser of two.

    Raises:
        ShearingError: the budget lies outside of what the levels span.
    """
    grid = Grid.of(units, levels=levels)
    lowest, highest = sum(map(min, grid.kept)), sum(map(max, grid.kept))
    if not grid.density(lowest) <= budget <= grid.density(highest):
        raise ShearingError(
            "sparsity",
            value=float(1 - budget),
            allowed=f"between {float(1 - grid.density(highest)):g} and {float(1 - grid.density(lowest)):g}, which is "
            f"what the levels {', '.join(map(str, levels))} span",
            mend="add levels on both sides of the sparsity, or choose another sparsity",
        )
    reachable = np.flatnonzero(np.isfinite(_costs(grid, [[0.0] * len(levels)] * len(units))[-1]))
    return min((grid.density(int(total)) for total in reachable), key=lambda density: (abs(density - budget), density))


def closest_levels(
    wanted: Sequence[float], *, units: Sequence[Unit], levels: Sequence[Pattern], budget: Fraction
) -> list[int]:
    """The choice of levels nearest to wanted densities among all that meet the budget exactly.

    Minimises the sum over units of size times squared difference of density, by dynamic programming over units and
    quanta: the optimum, not a repair.

    Args:
        wanted: U densities; they need not meet the budget nor lie between the levels.
        units: what gets a level each.
        levels: to choose from.
        budget: mean density, one that `nearest_budget` has found.

    Returns:
        U indices of levels.

    Raises:
        ShearingError: no choice meets the budget.
    """
    scale = sum(unit.size for unit in units)
    distances = [
        [unit.size / scale * (float(level.density) - density) ** 2 for level in levels]
        for unit, density in zip(units, wanted, strict=True)
    ]
    return cheapest_levels(distances, units=units, levels=levels, budget=budget)


def cheapest_levels(
    costs: Sequence[Sequence[float]], *, units: Sequence[Unit], levels: Sequence[Pattern], budget: Fraction
) -> list[int]:
    """The choice of levels of the least sum of costs [U][V] among all that meet the budget exactly; U indices.

    Raises:
        ShearingError: no choice meets the budget.
    """
    grid = Grid.of(units, levels=levels)
    table = _costs(grid, costs)
    target = budget * grid.size
    if target.denominator != 1 or not 0 <= target < table.shape[1] or not np.isfinite(table[-1][int(target)]):
        nearest = nearest_budget(units, levels=levels, budget=budget)
        raise ShearingError(
            "sparsity",
            value=float(1 - budget),
            allowed=f"one that levels {', '.join(map(str, levels))} can be mixed to, the nearest being "
            f"{float(1 - nearest)!r}",
            mend="choose that sparsity, or other levels",
        )
    choice = []
    total = int(target)
    for unit in range(len(units) - 1, -1, -1):
        before = [
            table[unit][total - kept] + costs[unit][level] if kept <= total else math.inf
            for level, kept in enumerate(grid.kept[unit])
        ]
        level = min(range(len(levels)), key=before.__getitem__)
        choice.append(level)
        total -= grid.kept[unit][level]
    return choice[::-1]


def _costs(grid: Grid, costs: Sequence[Sequence[float]]) -> Costs:
    """[U + 1, K]: the least cost at which the first units keep so many quanta; infinity where they cannot.

    Raises:
        ShearingError: there are too many of both.
    """
    units, quanta = len(grid.kept), sum(map(max, grid.kept))
    if (units + 1) * (quanta + 1) > MOST_CELLS:
        raise ShearingError(
            "unit",
            value=f"matrix: {units:,} of them, which keep multiples of {quanta:,} parts of the weights",
            allowed=f"as many as a table of {8 * MOST_CELLS / 1e9:.0f} GB can be made for; these take "
            f"{8 * (units + 1) * (quanta + 1) / 1e9:,.0f} GB",
            mend="set unit: block, or fewer and coarser levels, as 1:4,2:4,3:4",
        )
    table = np.full((units + 1, quanta + 1), np.inf)
    table[0, 0] = 0.0
    for unit, of_unit in enumerate(grid.kept):
        for level, kept in enumerate(of_unit):
            through = table[unit, : table.shape[1] - kept] + costs[unit][level]
            np.minimum(table[unit + 1, kept:], through, out=table[unit + 1, kept:])
    return table
