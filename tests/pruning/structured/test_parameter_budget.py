"""A parameter budget whose result is uniform: the sizes nearest to what was learned that the budget holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shearing.errors import ShearingError
from shearing.models.recipe import TargetRecipe
from shearing.models.shape import Shape, export_error, resolve_target
from shearing.pruning.structured.granularities import granularities_of, smallest_shape
from shearing.pruning.structured.importance.chance import random_scores
from shearing.pruning.structured.parameter_budget import (
    ParameterBudget,
    round_to_budget,
    shape_or_budget,
    uniform_shape,
)
from tests.models.tiny import CONFIGS, tiny_model

SOURCE = dataclasses.replace(
    Shape.of(tiny_model().config), num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8
)


def uniform(granularities: list[str], *, parameters: int, seed: int = 0, source: Shape = SOURCE, accepts=None) -> Shape:
    """The uniform shape of masks that keep the best of random scores."""
    masks = round_to_budget(
        random_scores(source, seed=seed),
        granularities=granularities_of(granularities, source=source, target=None),
        source=source,
        parameters=parameters,
    )
    budget = ParameterBudget(parameters, uniform=True, accepts=accepts or (lambda shape: True))
    return uniform_shape(masks, source=source, budget=budget)


def test_a_target_is_a_shape_or_a_budget():
    config = CONFIGS["llama"]()
    sizes = TargetRecipe(hidden_size=24)
    assert shape_or_budget(sizes, source=config) == resolve_target(sizes, source=config)
    found = shape_or_budget(TargetRecipe(parameters=15_000, uniform=True, multiple_of=4), source=config)
    assert isinstance(found, ParameterBudget)
    assert (found.parameters, found.uniform, found.multiple_of) == (15_000, True, 4)
    assert found.accepts(Shape.of(config))
    assert not found.accepts(dataclasses.replace(Shape.of(config), num_attention_heads=5))
    with pytest.raises(ShearingError, match="either a budget or sizes"):
        shape_or_budget(TargetRecipe(parameters=15_000, hidden_size=24), source=config)


@pytest.mark.parametrize("granularities", [["kv_groups"], ["layers", "kv_groups"], ["sublayers", "kv_groups"]])
def test_means_that_round_to_more_than_the_budget_end_in_the_nearest_sizes_within_it(granularities):
    smallest = smallest_shape(granularities, source=SOURCE).num_parameters()
    for seed in range(24):
        parameters = smallest + (SOURCE.num_parameters() - smallest) * (seed + 1) // 26
        shape = uniform(granularities, parameters=parameters, seed=seed)
        assert smallest <= shape.num_parameters() <= parameters
        if granularities == ["kv_groups"]:
            heads = shape.num_attention_heads + 1
            more = dataclasses.replace(shape, num_attention_heads=heads, num_key_value_heads=heads)
            assert more.num_parameters() > parameters


def test_a_budget_of_the_smallest_shape_is_met():
    smallest = smallest_shape(["layers", "kv_groups"], source=SOURCE)
    assert uniform(["layers", "kv_groups"], parameters=smallest.num_parameters()) == smallest


def test_of_means_that_are_off_alike_the_larger_shape_is_taken():
    layers = torch.tensor([1.0] * 6 + [0.0] * 2)
    groups = torch.tensor([[1.0] * 6 + [0.0] * 2] * 8)
    wide, deep = (
        dataclasses.replace(SOURCE, num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=heads)
        for depth, heads in ((5, 6), (6, 5))
    )
    assert wide.num_parameters() < deep.num_parameters()
    budget = ParameterBudget(deep.num_parameters(), uniform=True, accepts=lambda shape: True)
    assert uniform_shape({"layers": layers, "kv_groups": groups}, source=SOURCE, budget=budget) == deep


def test_sizes_that_the_config_cannot_hold_are_passed_over_and_refused_only_where_there_are_no_others():
    config = CONFIGS["gpt_neox"]()
    source = Shape.of(config)

    def accepts(shape: Shape) -> bool:
        return export_error(shape, source=config) is None

    parameters = source.num_parameters() * 9 // 10
    shape = uniform(["layers", "kv_groups"], parameters=parameters, source=source, accepts=accepts)
    assert shape == dataclasses.replace(source, num_hidden_layers=shape.num_hidden_layers)
    with pytest.raises(ShearingError, match="prune more kinds of units"):
        uniform(["kv_groups"], parameters=parameters, source=source, accepts=accepts)


def test_query_heads_of_groups_that_are_gone_do_not_count():
    source = dataclasses.replace(SOURCE, num_attention_heads=32)
    groups = torch.zeros(8, 8)
    groups[:, :4] = 1.0
    shapes = set()
    for of_gone in (0.0, 1.0):
        heads = torch.full((8, 8, 4), of_gone)
        heads[:, :4] = torch.tensor([1.0, 1.0, 1.0, 0.0])
        masks = {"kv_groups": groups, "query_heads": heads}
        budget = ParameterBudget(source.num_parameters(), uniform=True, accepts=lambda shape: True)
        shapes.add(uniform_shape(masks, source=source, budget=budget))
    assert [(shape.num_key_value_heads, shape.num_attention_heads) for shape in shapes] == [(4, 12)]
