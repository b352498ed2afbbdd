"""Shapes at a budget against all shapes there are, and a cover of them."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest

from shearing.models.shape import Shape, export_error
from shearing.runs.search.recipe import SearchRecipe
from shearing.runs.search.space import Bounds, cover, memory_of, shapes_at
from tests.models.tiny import tiny_model

CONFIG = tiny_model().config
SOURCE = Shape.of(CONFIG)
GRANULARITIES = ("layers", "kv_groups", "query_heads", "intermediate", "hidden")
SEARCH = SearchRecipe(multiple_of=4, tolerance=0.1)


def accepts(shape: Shape) -> bool:
    return export_error(shape, source=CONFIG) is None


def bounds(search: SearchRecipe = SEARCH) -> Bounds:
    return Bounds.of(search, source=SOURCE, granularities=GRANULARITIES)


def shapes(*, budget: int) -> list[Shape]:
    found = shapes_at(
        budget,
        cost=lambda shape: shape.num_parameters(),
        bounds=bounds(),
        source=SOURCE,
        tolerance=SEARCH.tolerance,
        accepts=accepts,
    )
    return list(found.fitting)


def test_shapes_at_a_budget_are_all_that_spend_it() -> None:
    """Of each depth, width and number of heads the largest MLP, if it leaves less than a tenth."""
    budget = SOURCE.num_parameters() // 2
    within = bounds()
    expected = []
    for (H, K), d, L in product(within.heads, within.widths, within.layers):
        made = [
            dataclasses.replace(
                SOURCE,
                num_hidden_layers=L,
                hidden_size=d,
                num_attention_heads=H,
                num_key_value_heads=K,
                intermediate_size=m,
            )
            for m in within.mlps
        ]
        affordable = [shape for shape in made if shape.num_parameters() <= budget and accepts(shape)]
        if affordable and affordable[-1].num_parameters() >= 0.9 * budget:
            expected.append(affordable[-1])
    found = shapes(budget=budget)
    assert expected
    assert {str(shape) for shape in found} == {str(shape) for shape in expected}


def test_what_comes_nearest_is_named_where_nothing_fits() -> None:
    found = shapes_at(
        10,
        cost=lambda shape: shape.num_parameters(),
        bounds=bounds(),
        source=SOURCE,
        tolerance=0.1,
        accepts=accepts,
    )
    assert not found.fitting
    assert not found.below
    costs = [cost for cost, _ in found.above]
    assert costs == sorted(costs)
    assert len(costs) == 3


def test_a_cover_is_the_same_every_time_and_has_all_numbers_of_heads() -> None:
    # Of a larger source, so that there is something to choose among.
    source = dataclasses.replace(SOURCE, num_hidden_layers=24, hidden_size=96, intermediate_size=192)
    candidates = [
        dataclasses.replace(source, num_hidden_layers=L, hidden_size=d, intermediate_size=m, num_attention_heads=H)
        for L, d, m, H in product(range(8, 25, 4), range(32, 97, 16), range(64, 193, 32), (2, 4))
    ]
    chosen = cover(candidates, count=9, source=source)
    assert chosen == cover(candidates, count=9, source=source)
    assert len(set(chosen)) == 9
    assert set(chosen) <= set(candidates)
    assert [shape.num_attention_heads for shape in chosen].count(4) == 5
    assert cover(candidates[:3], count=9, source=source)
    assert len({shape.num_hidden_layers for shape in chosen}) > 2
    assert len({shape.hidden_size for shape in chosen}) > 2


def test_what_may_not_be_pruned_stays() -> None:
    within = Bounds.of(SearchRecipe(keep_heads=True), source=SOURCE, granularities=("layers", "hidden"))
    assert list(within.mlps) == [SOURCE.intermediate_size]
    assert list(within.heads) == [(SOURCE.num_attention_heads, SOURCE.num_key_value_heads)]
    assert max(within.widths) == SOURCE.hidden_size
    assert min(within.layers) == max(1, round(0.3 * SOURCE.num_hidden_layers))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_memory_by_hand(batch_size: int) -> None:
    cache = 2 * SOURCE.num_hidden_layers * SOURCE.num_key_value_heads * SOURCE.head_dim * 100 * batch_size
    found = memory_of(SOURCE, batch_size=batch_size, context=100, bytes_per_value=2)
    assert found == 2 * (SOURCE.num_parameters() + cache)
