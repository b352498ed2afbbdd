"""Candidates: a level for every unit, whose mean density is the budget exactly, and what varies them.

Everything here keeps the budget: operators that leave it go through `Space.repair`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from shearing.pruning.sparse.allocation.allocator import Unit
from shearing.pruning.sparse.allocation.level_budget import Grid, closest_levels
from shearing.pruning.sparse.patterns import Pattern

Genome = tuple[int, ...]
"""Index of a level for each unit."""


@dataclass(frozen=True)
class Space:
    """All candidates.

    Attributes:
        units: what gets a level each.
        levels: to choose from, sparsest first.
        budget: mean density, weighed by parameters, that every candidate has; one that can be reached.
    """

    units: Sequence[Unit]
    levels: Sequence[Pattern]
    budget: Fraction

    @cached_property
    def grid(self) -> Grid:
        """What levels keep of units in whole quanta."""
        return Grid.of(self.units, levels=self.levels)

    @cached_property
    def quanta(self) -> int:
        """What every candidate keeps."""
        return int(self.budget * self.grid.size)

    def holds(self, genome: Genome) -> bool:
        """Whether a candidate is in bounds and meets the budget."""
        inside = len(genome) == len(self.units) and all(0 <= level < len(self.levels) for level in genome)
        return inside and self.grid.total(genome) == self.quanta

    def closest(self, wanted: Sequence[float]) -> Genome:
        """The candidate nearest to wanted densities; see `closest_levels`."""
        return tuple(closest_levels(wanted, units=self.units, levels=self.levels, budget=self.budget))

    def uniform(self) -> Genome:
        """The candidate nearest to the budget everywhere."""
        return self.closest([float(self.budget)] * len(self.units))

    def repair(self, genome: Sequence[int], *, random: np.random.Generator) -> Genome:
        """Random single steps of units until the budget holds; where none leads there, the nearest candidate."""
        levels = list(genome)
        while missing := self.quanta - self.grid.total(levels):
            step = 1 if missing > 0 else -1
            able = [
                unit
                for unit, level in enumerate(levels)
                if 0 <= level + step < len(self.levels) and self._gain(unit, level, step) <= abs(missing)
            ]
            if not able:
                return self.closest([float(self.levels[level].density) for level in levels])
            levels[int(random.choice(able))] += step
        return tuple(levels)

    def crossover(self, one: Genome, other: Genome, *, random: np.random.Generator) -> Genome:
        """Each unit's level from one of two candidates (uniform crossover), repaired."""
        from_one = random.random(len(one)) < 0.5
        return self.repair([a if first else b for a, b, first in zip(one, other, from_one, strict=True)], random=random)

    def mutate(self, genome: Genome, *, more: float, random: np.random.Generator) -> Genome:
        """One or more paired swaps, after each another one with probability `more`."""
        for _ in range(int(random.geometric(1 - more))):
            genome = self.swap(genome, random=random)
        return genome

    def swap(self, genome: Genome, *, random: np.random.Generator) -> Genome:
        """One unit a level sparser, another a level denser (the operator of EvoPress, arXiv 2410.14649), repaired.

        The other is one that gains what the first loses, where there is one.
        """
        down = [unit for unit, level in enumerate(genome) if level > 0]
        up = [unit for unit, level in enumerate(genome) if level + 1 < len(self.levels)]
        if not down or not up:
            return genome
        first = int(random.choice(down))
        lost = self._gain(first, genome[first], -1)
        others = [unit for unit in up if unit != first]
        equal = [unit for unit in others if self._gain(unit, genome[unit], 1) == lost]
        if not others:
            return genome
        second = int(random.choice(equal or others))
        levels = list(genome)
        levels[first] -= 1
        levels[second] += 1
        return self.repair(levels, random=random)

    def _gain(self, unit: int, level: int, step: int) -> int:
        kept = self.grid.kept[unit]
        return abs(kept[level + step] - kept[level])
