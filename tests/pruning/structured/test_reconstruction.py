"""Which units the others can stand in for, and weights that make up for those that go."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shearing.data.documents import Inputs
from shearing.models.cutting import compact
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.pruning.calibration.walk import first_inputs, run_layer
from shearing.pruning.structured.compensation import compensate
from shearing.pruning.structured.importance.activations import activation_importance
from shearing.pruning.structured.importance.reconstruction import DAMPING, elimination_order, reconstruction_importance
from shearing.pruning.structured.importance.scores import select
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model

BATCHES = [Inputs(tiny_ids(sequences=8, seed=seed)) for seed in range(8)]


def masked_logits(model: MaskedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids) @ model.head_weight().T


def residual_streams(model: MaskedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each layer but the first and the final norm read."""
    seen: list[torch.Tensor] = []
    places = [*model.model.model.layers[1:], model.model.model.norm]
    handles = [place.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])) for place in places]
    masked_logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def refit_error(weight: torch.Tensor, moment: torch.Tensor, gone: list[int]) -> float:
    """Mean square of what the output lacks after the best refit without the columns `gone`, by its definition."""
    kept = [column for column in range(weight.shape[1]) if column not in gone]
    refit = torch.linalg.lstsq(moment[kept][:, kept], moment[kept] @ weight.T).solution.T
    lacks = weight.clone()
    lacks[:, kept] -= refit
    return float(torch.einsum("oi,ij,oj->", lacks, moment, lacks))


def damped_moment(x: torch.Tensor) -> torch.Tensor:
    moment = x.T @ x / len(x)
    return moment + torch.diag(DAMPING * moment.diagonal())


@pytest.mark.parametrize(("rows", "units"), [(1, 12), (1, 4), (2, 3), (3, 4)])
def test_the_elimination_order_is_the_greedy_one_by_explicit_refits(rows: int, units: int):
    generator = torch.Generator().manual_seed(rows * 10 + units)
    width = 12 // (rows * units)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(500, 12, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    moment = x.T @ x / len(x)
    scores = elimination_order(weight, moment, rows=rows, units=units, remove=units - 1)

    damped, gone = damped_moment(x), []
    expected = torch.full((rows, units), float(units - 1))
    for order in range(units - 1):
        owing = set(range(rows))
        while owing:
            options = {}
            for row in owing:
                for unit in range(units):
                    if expected[row, unit] == units - 1:
                        first = (row * units + unit) * width
                        columns = [*gone, *range(first, first + width)]
                        options[row, unit] = refit_error(weight, damped, columns)
            row, unit = min(options, key=options.__getitem__)
            expected[row, unit] = order
            first = (row * units + unit) * width
            gone += range(first, first + width)
            owing.remove(row)
    assert torch.equal(scores, expected)


def test_removing_several_at_once_takes_the_cheapest_and_keeps_the_rest_in_order():
    moment = torch.diag(torch.arange(1.0, 17.0))
    scores = elimination_order(torch.ones(3, 16), moment, rows=1, units=16, remove=9, at_once=4)
    assert scores[0].argsort().tolist() == list(range(16))


def test_of_two_units_that_say_the_same_one_goes_first_and_the_other_stays_to_the_end():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 3 * x[:, 2]
    scores = elimination_order(torch.ones(4, 8), x.T @ x / 500, rows=1, units=8, remove=7)
    assert {int(scores.argmin()), int(scores.argmax())} == {2, 5}


def test_reconstruction_importance_ranks_heads_groups_and_units_and_leaves_the_rest_to_activations():
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[7] = 0.0
            layer.self_attn.v_proj.weight[: Shape.of(model.config).head_dim] = 0.0
    scores = reconstruction_importance(model, batches=BATCHES, target=None)
    by_activations = activation_importance(model, batches=BATCHES)
    assert (scores["intermediate"].argmin(-1) == 7).all()
    assert (scores["kv_groups"].argmin(-1) == 0).all()
    assert {name: score.shape for name, score in scores.items()} == {n: s.shape for n, s in by_activations.items()}
    for name in ("layers", "attention", "mlp", "hidden"):
        torch.testing.assert_close(scores[name], by_activations[name])


def test_compensation_makes_up_exactly_for_units_that_others_repeat():
    """Head 1 of each group and unit 9 repeat head 0 and unit 4: without them the logits have to stay as they are."""
    model = tiny_model("llama")
    source = Shape.of(model.config)
    dh, group = source.head_dim, source.query_heads_per_group
    with torch.no_grad():
        for layer in model.model.layers:
            q, up, gate = layer.self_attn.q_proj.weight, layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight
            for first in range(0, source.num_attention_heads, group):
                q[(first + 1) * dh : (first + 2) * dh] = q[first * dh : (first + 1) * dh]
            gate[9], up[9] = gate[4], 2 * up[4]
    heads = torch.ones(source.num_hidden_layers, source.num_key_value_heads, group)
    heads[..., 1] = 0.0
    units = torch.ones(source.num_hidden_layers, source.intermediate_size)
    units[:, 9] = 0.0
    masks, ids = Masks(query_heads=heads, intermediate=units), tiny_ids(seed=99)
    subject = MaskedModel(model)
    whole = masked_logits(subject, ids)
    subject.set_masks(masks)
    cut = masked_logits(subject, ids)
    compensate(subject, masks=masks, batches=BATCHES, ridge=1e-6)
    error, error_before = (masked_logits(subject, ids) - whole).norm(), (cut - whole).norm()
    assert error < 1e-3 * error_before


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("tied", [True, False])
def test_compensation_brings_the_residual_stream_closer_to_the_whole_models(family: str, tied: bool):
    model = tiny_model(family, tied=tied)
    source = Shape.of(model.config)
    target = dataclasses.replace(
        source,
        num_hidden_layers=source.num_hidden_layers - 1,
        intermediate_size=source.intermediate_size * 3 // 4,
        hidden_size=source.hidden_size - source.num_attention_heads,
    )
    importance = reconstruction_importance(model, batches=BATCHES, target=target)
    importance["layers"] = (torch.arange(source.num_hidden_layers) != 1).float()
    masks, selection = select(importance, source=source, target=target)
    subject, ids = MaskedModel(model), BATCHES[0].tokens
    whole = residual_streams(subject, ids)
    subject.set_masks(masks)
    cut = residual_streams(subject, ids)
    layers = []
    compensate(subject, masks=masks, batches=BATCHES, ridge=0.01, advance=layers.append)
    compensated = residual_streams(subject, ids)
    assert layers == [1] * source.num_hidden_layers
    alive = masks.hidden > 0
    for wanted, before, after in zip(whole, cut, compensated, strict=True):
        size = wanted.norm(dim=-1, keepdim=True)
        assert ((after - wanted) / size)[..., alive].norm() < ((before - wanted) / size)[..., alive].norm()

    masked = masked_logits(subject, ids)
    small = compact(subject.release(), masks=masks, selection=selection)
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, masked, rtol=1e-4, atol=1e-4)


def test_compensation_without_anything_to_make_up_for_changes_nothing():
    model = tiny_model("qwen3")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    source = Shape.of(model.config)
    masks = Masks(intermediate=torch.ones(source.num_hidden_layers, source.intermediate_size))
    subject = MaskedModel(model.train())
    compensate(subject, masks=masks, batches=BATCHES[:2])
    assert model.training
    for name, parameter in subject.release().named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-sliding", "qwen3"])
def test_layers_one_by_one_are_the_whole_model(family: str) -> None:
    model = MaskedModel(tiny_model(family))
    batch = Inputs(tiny_ids(sequences=2))
    streams, calls = first_inputs(model.model, [batch])
    assert len(streams) == len(calls) == 1
    for layer, call, expected in zip(
        model.model.model.layers, calls[0], residual_streams(model, batch.tokens), strict=True
    ):
        with torch.no_grad():
            _, streams[0] = run_layer(layer, layer, streams[0], call, places={})
        torch.testing.assert_close(streams[0], expected)
