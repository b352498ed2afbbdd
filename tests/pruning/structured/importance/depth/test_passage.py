"""A model without some of its parts, from any layer on."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shearing.data.documents import Inputs
from shearing.models.anatomy import backbone, decoder_layers
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.depth.passage import Passage, as_scores, lowest_layer, parts_of
from shearing.pruning.structured.importance.metric import Evidence, Metric
from shearing.pruning.structured.importance.registry import metric_of
from tests.models.declared import DECLARED, declared_families
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model


@pytest.mark.parametrize("family", [*CONFIGS, *DECLARED])
def test_what_is_left_out_is_what_a_mask_of_zeros_leaves_out(family: str) -> None:
    with declared_families(), torch.no_grad():
        model, ids = tiny_model(family), tiny_ids(sequences=3)
        passage, L = Passage(model, Inputs(ids)), 4
        whole = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(passage.to_end(passage.stream, gone=frozenset()), whole)
        parts = parts_of("sublayers", layers=L)
        results = {}
        for gone in itertools.combinations(range(2 * L), 2):
            absent = parts[gone[0]] | parts[gone[1]]
            first = lowest_layer(absent)
            stream = passage.stream
            for layer in range(first):
                stream = passage.through_layer(layer, stream, gone=frozenset())
            results[gone] = passage.to_end(stream, first=first, gone=absent)
        masked = MaskedModel(model)
        for gone, hidden in results.items():
            mask = torch.ones(2 * L)
            mask[list(gone)] = 0.0
            masked.set_masks(Masks(attention=mask[0::2], mlp=mask[1::2]))
            torch.testing.assert_close(hidden, masked(ids), rtol=1e-5, atol=1e-5)


def test_parts_are_named_as_scores_are() -> None:
    assert parts_of("layers", layers=2)[1] == {("attention", 1), ("mlp", 1)}
    assert [set(part) for part in parts_of("sublayers", layers=2)] == [
        {("attention", 0)},
        {("mlp", 0)},
        {("attention", 1)},
        {("mlp", 1)},
    ]
    scores = as_scores("sublayers", torch.arange(4.0))
    assert {name: values.tolist() for name, values in scores.items()} == {"attention": [0, 2], "mlp": [1, 3]}


def layers_computed(model: PreTrainedModel, *, metric: Metric, evidence: Evidence) -> int:
    """How often MLPs run."""
    calls: list[int] = []

    def count(_module: Any, arguments: Any) -> None:
        calls.append(arguments[0].shape[0] * arguments[0].shape[1])

    handles = [layer.mlp.register_forward_pre_hook(count) for layer in decoder_layers(model)]
    metric.scores(model, evidence=evidence)
    for handle in handles:
        handle.remove()
    return sum(calls)


@pytest.mark.parametrize(
    "name",
    [
        "block_influence",
        "layer_taylor",
        "leave_one_out",
        "leave_one_out_sublayers",
        "leave_one_out_greedy",
        "shapley",
        "shapley_logits",
        "policy_gradient",
        "hard_budget",
    ],
)
def test_the_cost_is_what_is_computed(name: str) -> None:
    model = tiny_model()
    source = Shape.of(model.config)
    text = [Inputs(tiny_ids(seed=seed)) for seed in range(2)]
    evidence = Evidence(text=text, target=dataclasses.replace(source, num_hidden_layers=2))
    metric = metric_of(name)
    computed = layers_computed(model, metric=metric, evidence=evidence)
    assert metric.cost(source, evidence=evidence).forward_tokens * source.num_hidden_layers == computed


def test_sublayers_in_random_company_cost_no_more_than_is_said() -> None:
    model = tiny_model()
    evidence = Evidence(text=[Inputs(tiny_ids())])
    metric = metric_of("shapley_sublayers")
    source = Shape.of(model.config)
    computed = layers_computed(model, metric=metric, evidence=evidence)
    assert 0 < computed < metric.cost(source, evidence=evidence).forward_tokens * source.num_hidden_layers


@pytest.mark.parametrize("name", ["leave_one_out_sublayers", "leave_one_out_greedy", "layer_taylor", "hard_budget"])
def test_a_metric_leaves_nothing_in_the_model(name: str) -> None:
    model = tiny_model()
    model.model.norm.weight.requires_grad_(False)
    kinds = [type(module) for module in model.modules()]
    metric_of(name).scores(model, evidence=Evidence(text=[Inputs(tiny_ids())]))
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.norm.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
