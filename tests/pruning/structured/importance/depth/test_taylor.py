"""Layers by the first order of the loss."""

from __future__ import annotations

import pytest
import torch

from shearing.data.documents import Inputs
from shearing.pruning.structured.importance.depth.taylor import LayerTaylor, protected
from shearing.pruning.structured.importance.metric import Evidence
from tests.models.tiny import tiny_ids, tiny_model


@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen3"])
def test_it_is_the_sum_over_all_parameters_of_a_layer_of_weight_times_gradient(family: str) -> None:
    model = tiny_model(family)
    text = [Inputs(tiny_ids(seed=seed)) for seed in range(2)]
    scores = LayerTaylor().scores(model, evidence=Evidence(text=text))
    for batch in text:
        (model(input_ids=batch.tokens, labels=batch.tokens).loss / len(text)).backward()
    for index, layer in enumerate(model.model.layers):
        whole = sum(float((p.detach() * p.grad).abs().sum()) for p in layer.parameters())
        attention = [*layer.self_attn.parameters(), *layer.input_layernorm.parameters()]
        part = sum(float((p.detach() * p.grad).abs().sum()) for p in attention)
        assert float(scores["layers"][index]) == pytest.approx(whole, rel=1e-4)
        assert float(scores["attention"][index]) == pytest.approx(part, rel=1e-4)
        assert float(scores["mlp"][index]) == pytest.approx(whole - part, rel=1e-4)


def test_protected_ends_go_last_in_their_own_order() -> None:
    scores = torch.rand(32, generator=torch.Generator().manual_seed(0))
    raised = protected(scores)
    ends, middle = [0, 1, 2, 3, 30, 31], list(range(4, 30))
    assert raised[ends].min() > raised[middle].max()
    assert torch.equal(raised[ends].argsort(), scores[ends].argsort())
    assert torch.equal(raised[middle], scores[middle])


def test_few_layers_have_little_to_protect() -> None:
    scores = torch.rand(6, generator=torch.Generator().manual_seed(0))
    assert int((protected(scores) != scores).sum()) == 1
    assert torch.equal(protected(scores[:3]), scores[:3])


def test_the_protected_form_knows_whole_layers_alone() -> None:
    scores = LayerTaylor(protect=True).scores(tiny_model(), evidence=Evidence(text=[Inputs(tiny_ids())]))
    assert list(scores) == ["layers"]


def test_frozen_weights_have_gradients_too_and_stay_frozen() -> None:
    model, evidence = tiny_model(), Evidence(text=[Inputs(tiny_ids())])
    expected = LayerTaylor().scores(model, evidence=evidence)
    model.requires_grad_(False)
    scores = LayerTaylor().scores(model, evidence=evidence)
    assert all(torch.equal(scores[name], expected[name]) for name in expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
