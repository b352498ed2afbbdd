"""Budgets are met by parameters, exactly; what does not fit is refused before anything is pruned."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from shearing.errors import ShearingError
from shearing.pruning.calibration.places import Matrix
from shearing.pruning.sparse.allocation.allocator import Request, Unit, mean_density, patterns_of, require_fit, units_of
from shearing.pruning.sparse.allocation.level_budget import closest_levels, nearest_budget
from shearing.pruning.sparse.allocation.rules.uniform import Uniform
from shearing.pruning.sparse.criteria import criteria
from shearing.pruning.sparse.patterns import KeptOf, PerRow
from shearing.pruning.sparse.reconstruction import reconstructions

SMALL, LARGE = Matrix("small", 0, 8, 16), Matrix("large", 1, 8, 48)


def test_a_table_that_no_memory_holds_is_refused() -> None:
    experts = [Unit(str(index), 0, (Matrix(str(index), 0, 768, 2048),)) for index in range(18_432)]
    levels = [PerRow(Fraction(step, 32)) for step in range(1, 32)]
    with pytest.raises(ShearingError, match="set unit: block") as raised:
        nearest_budget(experts, levels=levels, budget=Fraction(1, 2))
    assert raised.value.field == "unit"


def request(**changes: Any) -> Request:
    values: dict[str, Any] = {
        "source": None,
        "matrices": [SMALL, LARGE],
        "calibration": None,
        "criterion": criteria()["magnitude"],
        "reconstruction": reconstructions()["none"],
        "damping": 0.01,
        "budget": Fraction(1, 2),
        "levels": [KeptOf(1, 4), KeptOf(2, 4), PerRow(Fraction(1, 4))],
        "unit": "block",
        "compute": None,
        "console": None,
    }
    return Request(**(values | changes))


def test_uniform_takes_the_level_of_the_budget() -> None:
    uniform = Uniform()
    assert uniform.allocate(request()).patterns == {"small": KeptOf(2, 4), "large": KeptOf(2, 4)}
    assert uniform.allocate(request(budget=Fraction(3, 4))).patterns["large"] == PerRow(Fraction(1, 4))
    with pytest.raises(ShearingError, match=r"1:4 \(0.75\), 2:4 \(0.5\), row 0.25 \(0.25\)"):
        uniform.allocate(request(budget=Fraction(2, 3)))


def test_density_is_weighed_by_parameters() -> None:
    mixed = {"small": KeptOf(1, 4), "large": KeptOf(3, 4)}
    assert mean_density(mixed, matrices=[SMALL, LARGE]) == Fraction(5, 8)
    require_fit(mixed, matrices=[SMALL, LARGE], budget=Fraction(5, 8))
    with pytest.raises(ShearingError, match=r"0\.625000 of the weights kept"):
        require_fit(mixed, matrices=[SMALL, LARGE], budget=Fraction(1, 2))


def test_an_allocation_of_another_model() -> None:
    with pytest.raises(ShearingError, match="one pattern for each matrix"):
        require_fit({"small": KeptOf(2, 4), "other": KeptOf(2, 4)}, matrices=[SMALL, LARGE], budget=Fraction(1, 2))
    with pytest.raises(ShearingError, match="16 inputs of small"):
        require_fit({"small": KeptOf(3, 6), "large": KeptOf(3, 6)}, matrices=[SMALL, LARGE], budget=Fraction(1, 2))


EIGHTHS = [KeptOf(kept, 8) for kept in range(1, 9)]


def units(sizes: list[int]) -> list[Unit]:
    return units_of([Matrix(f"m{i}", i, 8, 8 * size) for i, size in enumerate(sizes)], unit="matrix")


@given(data=st.data())
def test_the_closest_levels_meet_the_budget_exactly_and_are_the_best(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    of = units(sizes)
    levels = sorted(data.draw(st.sets(st.sampled_from(EIGHTHS), min_size=1, max_size=4)), key=lambda level: level.kept)
    choice = [data.draw(st.integers(0, len(levels) - 1)) for _ in sizes]
    wanted = [data.draw(st.floats(-0.5, 1.5)) for _ in sizes]
    matrices = [matrix for unit in of for matrix in unit.matrices]
    budget = mean_density(patterns_of(of, choice=choice, levels=levels), matrices=matrices)
    assert nearest_budget(of, levels=levels, budget=budget) == budget

    found = closest_levels(wanted, units=of, levels=levels, budget=budget)

    assert mean_density(patterns_of(of, choice=found, levels=levels), matrices=matrices) == budget

    def distance(indices: list[int]) -> float:
        return sum(
            unit.size * (float(levels[i].density) - w) ** 2 for unit, i, w in zip(of, indices, wanted, strict=True)
        )

    every = np.array(np.meshgrid(*[range(len(levels))] * len(sizes))).reshape(len(sizes), -1).T.tolist()
    allowed = [
        indices
        for indices in every
        if mean_density(patterns_of(of, choice=indices, levels=levels), matrices=matrices) == budget
    ]
    assert distance(found) <= min(map(distance, allowed)) + 1e-9


def test_a_budget_between_what_can_be_reached() -> None:
    of = units([1, 1, 1])
    levels = [KeptOf(1, 4), KeptOf(3, 4)]
    assert nearest_budget(of, levels=levels, budget=Fraction(1, 2)) == Fraction(5, 12)
    with pytest.raises(ShearingError, match=r"0\.583333"):
        closest_levels([0.5] * 3, units=of, levels=levels, budget=Fraction(1, 2))
    with pytest.raises(ShearingError, match=r"between 0.25 and 0.75"):
        nearest_budget(of, levels=levels, budget=Fraction(1, 8))
