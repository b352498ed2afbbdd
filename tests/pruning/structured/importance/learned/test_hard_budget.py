"""Gates under a hard budget."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shearing.data.documents import Inputs
from shearing.errors import ShearingError
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import Granularity
from shearing.pruning.structured.importance.activations import Activations
from shearing.pruning.structured.importance.learned.hard_budget import HardBudget, graded_gates, straight_through
from shearing.pruning.structured.importance.learned.masked_loss import frozen
from shearing.pruning.structured.importance.metric import Evidence, Scores
from shearing.pruning.structured.rounding import top_k
from tests.models.tiny import tiny_ids, tiny_model
from tests.models.trained import counting, trained_model


def test_masks_are_those_of_the_target_and_gradients_those_of_the_gates() -> None:
    gates = torch.tensor([[0.3, -2.0, 0.1], [0.0, 1.0, 2.0]], requires_grad=True)
    z = straight_through(gates, granularity=Granularity("kv_groups", (2, 3), 2))
    assert z.tolist() == [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (gradient,) = torch.autograd.grad((weights * z).sum(), gates)
    p = torch.sigmoid(gates.detach() / 1.5)
    torch.testing.assert_close(gradient, weights * p * (1 - p) / 1.5)


def test_graded_gates_are_even_and_in_order() -> None:
    gates = graded_gates(torch.tensor([[5.0, 7.0, 1.0, 6.0]]), spread=0.4)
    torch.testing.assert_close(gates, torch.tensor([[-0.1, 0.3, -0.3, 0.1]]))


def with_useless_units(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with twice as many MLP units: every second one writes nothing, and is as active as ten."""
    config = LlamaConfig(**{**model.config.to_dict(), "intermediate_size": 2 * model.config.intermediate_size})
    wide = LlamaForCausalLM(config).eval()
    state = dict(model.state_dict())
    for name, weight in state.items():
        if "gate_proj" in name or "up_proj" in name:
            state[name] = torch.stack([weight, 10.0 * weight], dim=1).flatten(0, 1)
        elif "down_proj" in name:
            state[name] = torch.stack([weight, torch.zeros_like(weight)], dim=2).flatten(1, 2)
    wide.load_state_dict(state)
    return wide


@pytest.mark.parametrize("graded", [False, True])
def test_planted_useless_units_go_where_activations_would_keep_them(graded: bool) -> None:
    model = with_useless_units(trained_model())
    target = dataclasses.replace(Shape.of(model.config), intermediate_size=40)
    text = [Inputs(counting(sequences=8, seed=3_000 + seed)) for seed in range(4)]
    evidence = Evidence(text=text, target=target)

    def useful(scores: Scores) -> float:
        return float((scores["intermediate"].topk(40).indices % 2 == 0).float().mean())

    @torch.no_grad()
    def loss(scores: Scores) -> float:
        with frozen(model) as loss_of:
            z = {"intermediate": top_k(scores["intermediate"], keep=40)}
            return sum(float(loss_of(z, batch)) for batch in text) / len(text)

    by_activations = Activations().scores(model, evidence=evidence)
    scores = HardBudget(epochs=5, graded=graded).scores(model, evidence=evidence)
    assert useful(by_activations) < 0.1
    assert useful(scores) > 0.65
    assert loss(scores) < loss(by_activations) / 2


def test_it_goes_by_the_seed_and_a_graded_start_does_not_ask_it() -> None:
    evidence = [Evidence(text=[Inputs(tiny_ids())], seed=seed) for seed in (0, 0, 1)]
    first, again, other = (HardBudget().scores(tiny_model(), evidence=each) for each in evidence)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    graded = [HardBudget(graded=True).scores(tiny_model(), evidence=each) for each in evidence[1:]]
    assert all(torch.equal(graded[0][name], graded[1][name]) for name in first)


def test_a_target_that_takes_nothing_leaves_the_scores_of_the_start() -> None:
    model = tiny_model()
    evidence = Evidence(text=[Inputs(tiny_ids())], target=Shape.of(model.config))
    expected = Activations().scores(model, evidence=evidence)
    calls: list[int] = []
    scores = HardBudget().scores(model, evidence=evidence, advance=calls.append)
    assert all(torch.equal(scores[name], expected[name]) for name in expected)
    assert len(calls) == HardBudget().units_of_work(Shape.of(model.config), evidence=evidence)


def test_losses_that_are_no_numbers_end_in_one_error_and_the_model_as_it_was() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ShearingError, match="initial_masks"):
        HardBudget().scores(model, evidence=Evidence(text=[Inputs(tiny_ids())]))
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
