"""A parameter budget for models with experts: what is left never falls below the experts of a token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shearing.models.shape import Shape, export_error
from shearing.pruning.structured.granularities import granularities_of, smallest_shape, unit_sizes
from shearing.pruning.structured.parameter_budget import (
    ParameterBudget,
    count_parameters,
    round_to_budget,
    uniform_shape,
)
from tests.models.experts import EXPERT_CONFIGS, GRANULARITIES, expert_configs


@pytest.fixture(autouse=True, scope="module")
def _configs() -> Iterator[None]:
    with expert_configs():
        yield


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_budget_is_met_and_made_uniform(family: str, share: float) -> None:
    config = EXPERT_CONFIGS[family]()
    source = Shape.of(config)
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(size, generator=generator) for name, size in unit_sizes(source).items()}
    granularities = granularities_of(GRANULARITIES, source=source, target=None)
    smallest = smallest_shape(GRANULARITIES, source=source)
    assert smallest.num_experts == 2
    parameters = int(smallest.num_parameters() + share * (source.num_parameters() - smallest.num_parameters()))
    masks = round_to_budget(scores, granularities=granularities, source=source, parameters=parameters)
    assert int(masks["experts"].sum(-1).min()) >= 2
    left = int(count_parameters({name: z.double() for name, z in masks.items()}, source=source))
    assert 0 <= parameters - left < parameters * 0.05
    budget = ParameterBudget(
        parameters=parameters, uniform=True, accepts=lambda shape: export_error(shape, source=config) is None
    )
    shape = uniform_shape(masks, source=source, budget=budget)
    assert shape.num_parameters() <= parameters
    assert shape.num_experts >= 2
    assert shape.intermediate_size % 8 == shape.hidden_size % 8 == 0
