"""Metrics and the refit on models whose MLPs are experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from shearing.data.documents import Inputs
from shearing.errors import ShearingError
from shearing.models.masked import MaskedModel
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import unit_sizes
from shearing.pruning.structured.importance.activations import Activations
from shearing.pruning.structured.importance.magnitude import Magnitude
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.registry import EVERYTHING, METRICS, metric_of
from shearing.pruning.structured.refitting.linear import refit
from shearing.pruning.structured.rounding import select, select_across_layers, shape_of
from tests.models.experts import expert_configs
from tests.models.tiny import tiny_ids, tiny_model

READ_WRITES = ("fluctuation", "wanda", "policy_gradient")  # the last starts by Wanda
GATES = ("hard_budget", "hard_budget_graded")
TEXT = [Inputs(tiny_ids(seed=seed)) for seed in range(2)]


@pytest.fixture(autouse=True, scope="module")
def _configs() -> Iterator[None]:
    with expert_configs():
        yield


def target_of(source: Shape) -> Shape:
    return dataclasses.replace(source, num_hidden_layers=3, intermediate_size=16, hidden_size=24, num_experts=3)


@pytest.mark.parametrize("name", [name for name in METRICS if name not in READ_WRITES + GATES])
def test_every_metric_scores_experts_and_their_units(name: str) -> None:
    model = tiny_model("qwen3_moe")
    source = Shape.of(model.config)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    evidence = Evidence(text=TEXT if METRICS[name].reads_text else [], target=target_of(source), seed=3)
    calls: list[int] = []
    gives = METRICS[name].gives
    scores = metric_of(name).scores(model, evidence=evidence, advance=calls.append)
    sizes = {granularity: size for granularity, size in unit_sizes(source).items() if granularity in gives}
    assert {granularity: tuple(values.shape) for granularity, values in scores.items()} == sizes
    assert all(values.isfinite().all() and values.dtype == torch.float32 for values in scores.values())
    assert calls == [1] * metric_of(name).units_of_work(source, evidence=evidence)
    metric_of(name).cost(source, evidence=evidence)
    rest = {} if gives == EVERYTHING else Magnitude().scores(model, evidence=evidence)
    masks, selection = select({**rest, **scores}, source=source, target=target_of(source))
    assert selection.shape(source) == shape_of(masks, source=source) == target_of(source)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", READ_WRITES + GATES)
def test_metrics_of_what_writes_read_and_of_gates_that_close_refuse_experts(name: str) -> None:
    with pytest.raises(ShearingError, match="not made of experts"):
        metric_of(name).units_of_work(Shape.of(tiny_model("mixtral").config), evidence=Evidence())


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_activations_are_what_the_router_makes_of_an_experts_output(family: str) -> None:
    """Against every expert computed for every token, one after the other."""
    model = tiny_model(family)
    reads: list[torch.Tensor] = []
    block = model.model.layers[1].mlp
    block.register_forward_pre_hook(lambda _module, arguments: reads.append(arguments[0].detach()))
    scores = Activations().scores(model, evidence=Evidence(text=TEXT))
    wanted, units = torch.zeros(6), torch.zeros(6, 24)
    for x_BSD in reads:
        _, weights, index = block.gate(x_BSD)
        for expert in range(6):
            gate, up = (x_BSD @ block.experts.gate_up_proj[expert].T).chunk(2, -1)
            inner = torch.nn.functional.silu(gate) * up
            weight_BS = torch.where(index == expert, weights, 0.0).sum(-1).view(2, 16)
            written = (inner @ block.experts.down_proj[expert].T).norm(dim=-1) * weight_BS
            wanted[expert] += written.mean(1).square().sum()
            units[expert] += (inner.abs() * weight_BS[..., None]).mean(1).square().sum(0)
    torch.testing.assert_close(scores["experts"][1], wanted.sqrt(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores["intermediate"][1], units.sqrt(), rtol=1e-4, atol=1e-6)


def test_magnitude_finds_planted_experts() -> None:
    model = tiny_model("mixtral", tied=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj[4].mul_(10)
            layer.mlp.experts.gate_up_proj[2, 24 + 7].mul_(10)  # the seventh unit's up projection
    scores = Magnitude().scores(model, evidence=Evidence())
    assert (scores["experts"].argmax(-1) == 4).all()
    assert (scores["intermediate"][:, 2].argmax(-1) == 7).all()


def test_one_ranking_over_all_layers_meets_the_targets_parameters() -> None:
    from shearing.pruning.structured.parameter_budget import count_parameters

    model = tiny_model("qwen3_moe")
    source = Shape.of(model.config)
    target = target_of(source)
    masks = select_across_layers(Magnitude().scores(model, evidence=Evidence()), source=source, target=target)
    parameters = int(count_parameters({name: z.double() for name, z in masks.tensors().items()}, source=source))
    assert 0 <= target.num_parameters() - parameters < 3 * source.hidden_size * 2


@torch.no_grad()
def test_the_refit_makes_up_for_heads_and_leaves_experts_alone() -> None:
    model = tiny_model("qwen3_moe", tied=False)
    source = Shape.of(model.config)
    target = dataclasses.replace(source, num_attention_heads=3, num_experts=4)
    masks, _ = select(Activations().scores(model, evidence=Evidence(text=TEXT)), source=source, target=target)
    text = [Inputs(tiny_ids(sequences=8, seed=seed)) for seed in range(4)]
    whole = model(text[0].tokens).logits
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    masked = MaskedModel(model)
    masked.set_masks(masks)
    unfitted = (masked.model(text[0].tokens).logits - whole).norm()
    refit(masked, masks=masks, batches=text, ridge=0.01)
    assert (masked.model(text[0].tokens).logits - whole).norm() < unfitted
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.rsplit(".", 2)[1] for name in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
