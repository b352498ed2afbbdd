from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from shearing.errors import ShearingError
from shearing.evaluation.reference_losses.power_law import fit_power_law, leave_one_out
from tests.repository import RECIPES

PUBLISHED: dict[str, Any] = json.loads((RECIPES / "reference" / "llama2-redpajama.json").read_text())
SIZES = [row["parameters"] for row in PUBLISHED["rows"]]
DOMAINS = list(PUBLISHED["rows"][0]["losses"])


def column(domain: str) -> list[float]:
    return [row["losses"][domain] for row in PUBLISHED["rows"]]


@pytest.mark.parametrize("row", PUBLISHED["published_predictions"], ids=lambda row: row["model"])
def test_published_predictions_come_out_to_four_decimals(row: dict[str, Any]) -> None:
    for domain in DOMAINS:
        law = fit_power_law(SIZES, losses=column(domain), bounded=False)
        assert [law.at(size) for size in SIZES] == pytest.approx(column(domain), abs=1e-11)
        assert law.at(row["parameters"]) == pytest.approx(row["losses"][domain], abs=0.5e-4 + 1e-9)


def test_the_bounded_fit_differs_for_one_domain_alone() -> None:
    for domain in DOMAINS:
        free, bounded = (fit_power_law(SIZES, losses=column(domain), bounded=each) for each in (False, True))
        if domain == "cc":
            assert (free.offset, free.exponent) == pytest.approx((-2.80, 0.028), abs=5e-3)
            assert bounded.offset == 0.0
            assert [bounded.at(row["parameters"]) for row in PUBLISHED["published_predictions"]] == pytest.approx(
                [2.1967, 1.9881, 1.8829], abs=1e-4
            )
        else:
            assert bounded == free


@given(
    a=st.floats(0.5, 5.0),
    b=st.floats(0.03, 1.0),
    c=st.floats(0.0, 2.0),
    sizes=st.lists(st.floats(7.0, 11.0), min_size=3, max_size=7, unique_by=lambda value: round(value * 4)),
)
def test_losses_that_follow_a_law_are_predicted(a: float, b: float, c: float, sizes: list[float]) -> None:
    parameters = [10.0**size for size in sizes]
    losses = [a * (size / 1e9) ** -b + c for size in parameters]
    law = fit_power_law(parameters, losses=losses)
    assert law.offset >= 0
    for size in parameters:
        assert law.at(size) == pytest.approx(a * (size / 1e9) ** -b + c, rel=1e-6)
    within = math.sqrt(min(parameters) * max(parameters))
    assert law.at(within) == pytest.approx(a * (within / 1e9) ** -b + c, rel=1e-4)
    errors = leave_one_out(parameters, losses=losses)
    assert (errors is None) == (len(sizes) == 3)
    inner = [
        error for error, size in zip(errors or [], parameters, strict=False) if min(parameters) < size < max(parameters)
    ]
    assert all(abs(error) < 1e-3 for error in inner)


@given(st.lists(st.floats(0.5, 5.0), min_size=4, max_size=6))
def test_no_other_law_is_better(losses: list[float]) -> None:
    losses = sorted(losses, reverse=True)
    parameters = [1e8 * 3.0**i for i in range(len(losses))]
    try:
        law = fit_power_law(parameters, losses=losses)
    except ShearingError:
        assert losses[0] == losses[-1]
        return
    squares = sum((law.at(size) - loss) ** 2 for size, loss in zip(parameters, losses, strict=True))
    assert law.scale > 0
    assert law.exponent > 0
    assert law.offset >= 0
    units = np.array(parameters) / law.unit
    for exponent in np.geomspace(2e-4, 3.9, 50):
        powers = units**-exponent
        for offset in np.linspace(0.0, min(losses), 20):
            rest = np.array(losses) - offset
            scale = max(0.0, float(powers @ rest / (powers @ powers)))
            assert squares <= float(((rest - scale * powers) ** 2).sum()) * (1 + 1e-9) + 1e-12


def test_the_unit_of_size_does_not_matter() -> None:
    losses = [3.0, 2.5, 2.3, 2.25]
    laws = [fit_power_law([unit * size for size in (1, 3, 9, 27)], losses=losses) for unit in (1.0, 1e9)]
    assert laws[0].at(5.0) == pytest.approx(laws[1].at(5e9), rel=1e-9)
    assert laws[1].a * 5e9 ** -laws[1].exponent + laws[1].offset == pytest.approx(laws[1].at(5e9), rel=1e-9)


def test_leave_one_out_is_the_error_of_a_fit_to_the_others() -> None:
    sizes, losses = [1e8, 3e8, 1e9, 3e9], [3.0, 2.7, 2.4, 2.3]
    errors = leave_one_out(sizes, losses=losses)
    assert errors is not None
    assert errors[1] == fit_power_law([1e8, 1e9, 3e9], losses=[3.0, 2.4, 2.3]).at(3e8) - 2.7


def test_what_is_no_law_is_refused() -> None:
    with pytest.raises(ShearingError, match="at least 3"):
        fit_power_law([1e8, 1e8, 1e9], losses=[3.0, 2.9, 2.0])
    with pytest.raises(ShearingError, match="losses that fall"):
        fit_power_law([1e8, 1e9, 1e10], losses=[2.0, 3.0, 4.0])
