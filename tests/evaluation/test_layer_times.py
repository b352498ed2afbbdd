"""A table of layer times against a device whose times are a formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import product

import pytest
import torch
from transformers import PreTrainedModel

from shearing.evaluation import layer_times
from shearing.evaluation.layer_times import LayerTimes, Times, layer_kinds, measure_layers, model_by_chance
from shearing.models.shape import Shape
from tests.models.tiny import tiny_model

CONFIG = tiny_model().config
SOURCE = Shape.of(CONFIG)
HEADS = ((2, 2), (4, 2)) if SOURCE.num_key_value_heads == 2 else ((2, 1), (4, 1))


def formula(shape: Shape) -> Times:
    """Linear in each size by itself, as what is interpolated has to be."""
    layer = 1 + 0.5 * shape.hidden_size * (1 + 0.1 * shape.intermediate_size) + 0.25 * shape.num_attention_heads
    return Times(
        prompt=7 * shape.hidden_size + shape.num_hidden_layers * layer,
        next_token=3 + shape.num_hidden_layers * layer / 10,
    )


def measured(monkeypatch: pytest.MonkeyPatch) -> LayerTimes:
    def times_of(models: Mapping[str, PreTrainedModel], *, context: int) -> dict[str, Times]:
        assert context == 16
        return {name: formula(Shape.of(model.config)) for name, model in models.items()}

    monkeypatch.setattr(layer_times, "times_of", times_of)
    grid = [
        dataclasses.replace(SOURCE, hidden_size=d, intermediate_size=m, num_attention_heads=H, num_key_value_heads=K)
        for (H, K), d, m in product(HEADS, (8, 16, 32), (8, 40))
    ]
    return measure_layers(grid, config=CONFIG, context=16, dtype=torch.float32, device=torch.device("cpu"))


def test_times_between_those_measured_are_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    table = measured(monkeypatch)
    for L, d, m, (H, K) in product((1, 5, 9), (8, 20, 32), (8, 24, 40), HEADS):
        shape = dataclasses.replace(
            SOURCE,
            num_hidden_layers=L,
            hidden_size=d,
            intermediate_size=m,
            num_attention_heads=H,
            num_key_value_heads=K,
        )
        found, wanted = table.of(shape), formula(shape)
        assert found.prompt == pytest.approx(wanted.prompt)
        assert found.next_token == pytest.approx(wanted.next_token)
    assert LayerTimes.from_json(table.to_json()) == table


def test_layers_that_attend_in_several_ways_count_by_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_model("gemma3").config
    kinds = layer_kinds(config)
    assert sum(kinds.values()) == pytest.approx(1)
    costs = {"sliding_attention": 1.0, "full_attention": 5.0}
    assert {config.layer_types[layer] for layer in kinds} == costs.keys()
    timed: list[list[str]] = []

    def times_of(models: Mapping[str, PreTrainedModel], *, context: int) -> dict[str, Times]:
        timed.extend(model.config.layer_types for model in models.values())
        sums = {name: sum(map(costs.__getitem__, model.config.layer_types)) for name, model in models.items()}
        return {name: Times(prompt=3 + total, next_token=7 + total) for name, total in sums.items()}

    monkeypatch.setattr(layer_times, "times_of", times_of)
    shape = Shape.of(config)
    table = measure_layers([shape], config=config, context=16, dtype=torch.float32, device=torch.device("cpu"))
    assert {kind for layers in timed for kind in layers} == costs.keys()
    whole = sum(map(costs.__getitem__, config.layer_types))
    assert table.of(shape) == Times(prompt=pytest.approx(3 + whole), next_token=pytest.approx(7 + whole))  # type: ignore[arg-type]
    model = model_by_chance(shape, config=config, dtype=torch.float32, device=torch.device("cpu"))
    assert model.config.layer_types == config.layer_types


def test_layers_are_timed_for_real() -> None:
    table = measure_layers([SOURCE], config=CONFIG, context=8, dtype=torch.float32, device=torch.device("cpu"))
    found = table.of(SOURCE)
    assert found.prompt > 0
    assert found.next_token > 0
