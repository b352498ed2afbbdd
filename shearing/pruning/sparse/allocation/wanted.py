"""From a density that each unit should have to levels that it can have, at the budget exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise

from shearing.pruning.sparse.allocation.allocator import Allocation, Request, Unit, patterns_of
from shearing.pruning.sparse.allocation.level_budget import closest_levels
from shearing.pruning.sparse.patterns import Pattern


def around_budget(densities: Sequence[float], *, units: Sequence[Unit], budget: Fraction) -> list[float]:
    """Densities shifted by one constant, so that their mean, weighed by parameters, is the budget."""
    weighed = sum(unit.size * density for unit, density in zip(units, densities, strict=True))
    shift = float(budget) - weighed / sum(unit.size for unit in units)
    return [density + shift for density in densities]


def progression(ranks: Sequence[float], *, spread: float, units: Sequence[Unit], budget: Fraction) -> list[float]:
    """Densities in arithmetic progression over ranks: the lowest rank is kept most.

    d = (1 - S) + a - 2 a (rank - lowest) / (highest - lowest), with S the sparsity and a the spread, shifted by
    `around_budget` where units differ in size.

    Args:
        ranks: of each unit; all the same: all get the budget.
        spread: a, half the range of the densities.
        units: of these ranks.
        budget: mean density.
    """
    lowest, highest = min(ranks), max(ranks)
    steps = [2 * (rank - lowest) / (highest - lowest) - 1 if highest > lowest else 0.0 for rank in ranks]
    return around_budget([-spread * step for step in steps], units=units, budget=budget)


def by_rank(scores: Sequence[float], *, spread: float, units: Sequence[Unit], budget: Fraction) -> list[float]:
    """`progression` over ranks of scores: the highest score is kept most."""
    descending = sorted(range(len(scores)), key=lambda index: -scores[index])
    ranks = [0.0] * len(scores)
    for rank, index in enumerate(descending):
        ranks[index] = float(rank)
    return progression(ranks, spread=spread, units=units, budget=budget)


def at_least_a_step(spread: float, *, levels: Sequence[Pattern]) -> float:
    """A spread, or the least step between neighbouring levels where that is more: with less, nothing would be mixed."""
    densities = sorted(float(level.density) for level in levels)
    steps = [denser - sparser for sparser, denser in pairwise(densities)]
    return max(spread, min(steps, default=0.0))


def allocate_by_traces(request: Request, *, traces: Mapping[str, float], spread: float) -> Allocation:
    """The allocation nearest to densities `by_rank` of each unit's trace per weight.

    Args:
        request: what is to be allocated.
        traces: of each matrix, by name, of what says how much the loss minds it.
        spread: half the range of densities.

    Raises:
        ShearingError: see `allocate_wanted`.
    """
    units = request.units
    scores = [sum(traces[matrix.name] for matrix in unit.matrices) / unit.size for unit in units]
    wanted = by_rank(scores, spread=spread, units=units, budget=request.budget)
    return allocate_wanted(request, scores=scores, wanted=wanted)


def allocate_wanted(request: Request, *, scores: Sequence[float], wanted: Sequence[float]) -> Allocation:
    """The allocation nearest to wanted densities, with `scores` and `wanted` by name of unit among its facts.

    Raises:
        ShearingError: no choice of levels meets the budget.
    """
    units = request.units
    choice = closest_levels(wanted, units=units, levels=request.levels, budget=request.budget)
    facts: Mapping[str, Mapping[str, float]] = {
        "scores": {unit.name: score for unit, score in zip(units, scores, strict=True)},
        "wanted": {unit.name: density for unit, density in zip(units, wanted, strict=True)},
    }
    return Allocation(patterns_of(units, choice=choice, levels=request.levels), facts)
