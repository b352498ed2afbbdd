"""Factors of weights (SPP) and changes of salient weights (SPEFT), against formulas written out with plain tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from shearing.errors import ShearingError
from shearing.training.adapters.adapted import adapted_layers, merge_in_place
from shearing.training.adapters.layers import adapters_by_layer, weakened
from shearing.training.adapters.speft import DeltaLinear, add_deltas, choose, saliences
from shearing.training.adapters.spp import ScaledLinear, add_factors
from tests.models.tiny import tiny_ids, tiny_model
from tests.training.adapters.test_lora import FAMILIES, sparse_model, train

TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")


def adapt(model: PreTrainedModel, masks: dict[str, Tensor], kind: str, *, dropout: float = 0.0) -> None:
    if kind == "spp":
        add_factors(model, rank=4, scale=2.0, dropout=dropout, targets=TARGETS)
    else:
        chosen_in = {name: model.get_parameter(name) for name in masks if name.split(".")[-2] in TARGETS}
        scores = saliences(chosen_in, losses=(), kind="magnitude")  # type: ignore[arg-type]
        add_deltas(model, chosen=choose(scores, kept=masks.get, share=0.1))


def test_changes_are_where_the_weight_is() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):  # as on a GPU, which need not be there
        base = nn.Linear(6, 8, bias=False, device="meta")
        base.weight = nn.Parameter(torch.empty(8, 6, device="cuda"))
        layers = ScaledLinear(base, rank=2, scale=2.0), DeltaLinear(base, chosen=torch.arange(3))
    for layer in layers:
        assert {each.device.type for each in (*layer.parameters(), *layer.buffers())} == {"cuda"}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["spp", "speft"])
def test_the_merged_model_computes_what_was_trained_and_keeps_every_zero(
    kind: str, family: str, dropout: float
) -> None:
    model, masks = sparse_model(family)
    with torch.no_grad():
        first = model(input_ids=tiny_ids(seed=9)).logits
    before = {name: model.get_parameter(name).clone() for name in masks}
    adapt(model, masks, kind, dropout=dropout)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=tiny_ids(seed=9)).logits, first)
    train(model)
    with torch.no_grad():
        trained = model(input_ids=tiny_ids(seed=9)).logits
    assert not torch.allclose(trained, first, atol=1e-3)
    merged = merge_in_place(model, masks=masks.items())
    assert [name for name, _ in merged.named_parameters()] == [
        name for name, _ in tiny_model(family).named_parameters()
    ]
    assert all(parameter.requires_grad for parameter in merged.parameters())
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=tiny_ids(seed=9)).logits, trained, rtol=1e-5, atol=1e-5)
    for name, mask in masks.items():
        weight = merged.get_parameter(name)
        assert not weight[~mask].any(), name
        assert torch.equal(weight, before[name]) != (name.split(".")[-2] in TARGETS), name


def spp_oracle(weight: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """W ⊙ (1 + c · rep(A) ⊙ b), one output after the other."""
    each = weight.shape[0] // a.shape[0]
    return torch.stack([weight[o] * (1 + scale * a[o // each] * b[o]) for o in range(weight.shape[0])])


def test_factors_have_the_gradients_of_the_formula() -> None:
    model, _ = sparse_model("llama")
    add_factors(model, rank=6, scale=3.0, targets=TARGETS)
    layer: Any = model.get_submodule("model.layers.1.self_attn.v_proj")
    a, b = layer.spp_inputs, layer.spp_outputs
    bound = 1 / 36**0.5
    assert a.shape == (6, 36)
    assert a.abs().max() <= bound
    assert a.abs().mean() > bound / 3
    assert b.shape == (24,)
    assert not b.any()
    with torch.no_grad():
        b.normal_()
    assert_gradients(layer, [a, b], lambda: spp_oracle(layer.weight, a, b, scale=3.0))


def test_deltas_have_the_gradients_of_the_formula() -> None:
    model, masks = sparse_model("llama")
    name = "model.layers.1.self_attn.v_proj"
    chosen = masks[f"{name}.weight"].flatten().nonzero()[::7, 0]
    add_deltas(model, chosen={f"{name}.weight": chosen})
    [(found, layer)] = adapted_layers(model)
    assert found == name
    deltas: Any = layer.speft_deltas
    assert [each.shape for each in model.parameters() if each.requires_grad] == [(len(chosen),)]
    with torch.no_grad():
        deltas.normal_()

    def weight() -> Tensor:
        change = torch.zeros(layer.weight.numel()).index_put((chosen,), deltas)
        return layer.weight + change.view_as(layer.weight)

    assert_gradients(layer, [deltas], weight)


def assert_gradients(layer: nn.Module, trained: list[Tensor], weight: Any) -> None:
    for strength in (1.0, 0.25):
        inputs, factors = torch.randn(2, 7, 36, requires_grad=True), torch.randn(2, 7, 24)
        leaves = [inputs, *trained]
        layer.strength = strength  # type: ignore[assignment]
        ours = torch.autograd.grad((layer(inputs) * factors).sum(), leaves)
        base: Any = layer.weight
        whole = base + strength * (weight() - base)
        expected = torch.autograd.grad(((inputs @ whole.t()) * factors).sum(), leaves)
        for mine, reference in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
    layer.strength = 1.0  # type: ignore[assignment]


@pytest.mark.parametrize("kind", ["spp", "speft"])
def test_in_bf16_and_compiled(kind: str) -> None:
    model, masks = sparse_model("llama")
    adapt(model, masks, kind)
    layer: Any = next(layer for _, layer in adapted_layers(model))
    inputs = torch.randn(3, layer.weight.shape[1], requires_grad=True)
    compiled = torch.compile(layer, backend="eager")
    for each in (layer, compiled):
        (each(inputs).square().sum()).backward()
    assert torch.equal(layer(inputs), compiled(inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(model)
    merged = merge_in_place(model.to(torch.bfloat16), masks=masks.items())
    assert merged.get_parameter("model.layers.0.self_attn.q_proj.weight").dtype == torch.bfloat16


def test_nothing_of_a_weights_size_is_kept_for_the_backward_pass() -> None:
    model, masks = sparse_model("llama")
    adapt(model, masks, "spp")
    layer: Any = model.get_submodule("model.layers.1.self_attn.q_proj")
    known = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    inputs = torch.randn(1, 2, 36)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(inputs)
    new = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in known]
    assert all(tensor.numel() <= inputs.numel() for tensor in new)


def test_a_rank_that_does_not_divide_the_outputs() -> None:
    model, _ = sparse_model("llama")  # outputs 48, 24, 36
    with pytest.raises(ShearingError, match=r"1, 2, 3, 4, 6, 12") as refused:
        add_factors(model, rank=16, targets=TARGETS)
    assert "rank=12" in str(refused.value)


def test_saliences_are_those_of_the_formulas() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    texts = [torch.randn(tokens, 3) for tokens in (4, 1, 7)]
    losses = [lambda x=x: (layer(x).square().sum(), torch.tensor(len(x))) for x in texts]
    gradients = torch.stack([torch.autograd.grad(layer(x).square().sum() / len(x), layer.weight)[0] for x in texts])
    of_all = torch.autograd.grad(layer(torch.cat(texts)).square().sum() / 12, layer.weight)[0]
    expected = {
        "gradient": of_all.abs(),
        "snip": (of_all * layer.weight).abs(),
        "fisher": gradients.square().mean(0),
        "magnitude": layer.weight.abs(),
    }
    for kind, score in expected.items():
        found = saliences({"w": layer.weight}, losses=losses, kind=kind)["w"]  # type: ignore[arg-type]
        torch.testing.assert_close(found, score.detach())


@pytest.mark.parametrize("unit", ["weight", "row", "column"])
@pytest.mark.parametrize("among_all", [False, True])
def test_what_is_chosen_is_kept_and_the_most_salient(unit: str, among_all: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    scores = {name: torch.rand(8, 10, generator=generator) * (1 + index) for index, name in enumerate("ab")}
    masks = {"a": torch.rand(8, 10, generator=generator) < 0.5}
    share = 0.2
    chosen = choose(scores, kept=masks.get, share=share, unit=unit, among_all=among_all)  # type: ignore[arg-type]
    whole = {name: masks.get(name, torch.ones(8, 10, dtype=torch.bool)) for name in scores}
    taken = {name: torch.zeros(80, dtype=torch.bool) for name in scores}
    for name, positions in chosen.items():
        assert positions.tolist() == sorted(set(positions.tolist()))
        taken[name][positions] = True
    for group in [list(scores)] if among_all else [["a"], ["b"]]:
        units = [
            (float(scores[name][where & whole[name]].mean()), int((where & whole[name]).sum()), name, where)
            for name in group
            for where in _units(unit)
            if (where & whole[name]).any()
        ]
        room, expected = share * sum(size for _, size, _, _ in units), {name: set() for name in group}
        for index, (_, size, name, where) in enumerate(sorted(units, key=lambda each: -each[0])):
            room -= size
            if room < 0 and index:
                break
            expected[name] |= set((where & whole[name]).flatten().nonzero()[:, 0].tolist())
        for name in group:
            assert set(taken[name].nonzero()[:, 0].tolist()) == expected[name]


def _units(unit: str) -> list[Tensor]:
    where = torch.arange(80).view(8, 10)
    key = {"weight": where, "row": where // 10, "column": where % 10}[unit]
    return [key == each for each in key.unique()]


@pytest.mark.parametrize("kind", ["spp", "speft", "lora"])
def test_weakened_adapters_do_less_while_it_lasts(kind: str) -> None:
    model, masks = sparse_model("llama")
    if kind == "lora":
        pytest.importorskip("peft")
        from shearing.training.adapters.lora import add_adapters

        train(add_adapters(model, masks=masks.items(), dropout=0.0))
    else:
        adapt(model, masks, kind)
        train(model)
    layers = adapters_by_layer(model)
    assert [each.layer for each in layers] == [0, 1, 2, 3]
    with torch.no_grad():
        before = model(input_ids=tiny_ids()).logits
        with weakened(layers, strength=0.0):
            nothing = model(input_ids=tiny_ids()).logits
        with weakened(layers[:1], strength=0.5):
            half = model(input_ids=tiny_ids()).logits
        after = model(input_ids=tiny_ids()).logits
        source = sparse_model("llama")[0](input_ids=tiny_ids()).logits
    assert torch.equal(before, after)
    torch.testing.assert_close(nothing, source, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(half, before, atol=1e-5)
