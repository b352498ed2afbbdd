"""Experts: masked and cut models agree, files are those of other readers, and what cannot be is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from shearing.errors import ShearingError
from shearing.models.anatomy import anatomy_of
from shearing.models.cutting import Selection, compact
from shearing.models.families.experts.balance import RouterBalance
from shearing.models.families.experts.products import compute_experts_under_autocast, experts_output
from shearing.models.masked import MaskedModel, Masks
from shearing.models.recipe import TargetRecipe
from shearing.models.shape import Shape, config_for, resolve_target
from shearing.pruning.structured.parameter_budget import count_parameters
from tests.models.experts import (
    EXPERT_CONFIGS,
    GRANULARITIES,
    SUBSETS,
    expert_configs,
    masks_and_target,
    subsets_of,
)
from tests.models.moments import require_moments_of_the_cut
from tests.models.tiny import tiny_ids, tiny_model


@pytest.fixture(autouse=True, scope="module")
def _configs() -> Iterator[None]:
    with expert_configs():
        yield


@torch.no_grad()
def difference(family: str, granularities, *, tied: bool, fractional: bool, seed: int) -> float:
    """Relative difference of masked and cut logits."""
    model = tiny_model(family, tied=tied, seed=seed)
    source = Shape.of(model.config)
    masks, target = masks_and_target(source, granularities, fractional=fractional, seed=seed)
    masked = MaskedModel(model)
    masked.set_masks(masks)
    expected = masked.model(tiny_ids(seed=seed)).logits
    small = compact(masked.release(), masks=masks, selection=Selection.of(masks, source=source, target=target))
    assert Shape.of(small.config) == target
    assert sum(p.numel() for p in small.parameters()) == target.num_parameters()
    assert int(count_parameters({name: z != 0 for name, z in masks.tensors().items()}, source=source)) == (
        target.num_parameters()
    )
    return float((small(tiny_ids(seed=seed)).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("fractional", [False, True], ids=["binary", "fractional"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", EXPERT_CONFIGS)
def test_masked_equals_compacted(family, tied, fractional):
    assert difference(family, GRANULARITIES, tied=tied, fractional=fractional, seed=1) < 1e-5


@pytest.mark.parametrize("granularities", SUBSETS)
def test_masked_equals_compacted_for_every_subset_of_granularities(granularities):
    for seed, family in enumerate(("mixtral", "qwen3_moe", "olmoe-clipped")):
        if granularities in subsets_of(family):
            assert difference(family, granularities, tied=True, fractional=True, seed=seed) < 1e-5


@pytest.mark.parametrize("family", EXPERT_CONFIGS)
def test_open_masks_are_the_dense_model(family):
    model = tiny_model(family)
    dense = model(tiny_ids()).logits
    masked = MaskedModel(model)
    torch.testing.assert_close(masked.model(tiny_ids()).logits, dense, rtol=1e-5, atol=1e-5)
    masked.set_masks(Masks(experts=torch.ones(4, 6), intermediate=torch.ones(4, 6, 24), mlp=torch.ones(4)))
    torch.testing.assert_close(masked.model(tiny_ids()).logits, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_under_autocast_are_the_stock_ones(family):
    """Forward and backward, without autocast; under it the products are bf16, as those of all other matrices."""
    model = tiny_model(family, tied=False)
    expected = model(tiny_ids()).logits
    gradients = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    compute_experts_under_autocast(model)
    found = model(tiny_ids()).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, stock in zip(
        torch.autograd.grad(found.square().mean(), list(model.parameters())), gradients, strict=True
    ):
        torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-5 * float(stock.abs().max()))
    seen: list[torch.dtype] = []
    act = model.model.layers[0].mlp.experts.act_fn
    act.register_forward_hook(lambda _module, _arguments, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tiny_ids())
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("tokens", [6, 90], ids=["few", "many"])
def test_products_under_masks_are_those_of_plain_autograd(tokens):
    """With more pairs than rows the matrices are scaled, with fewer what they read; one expert has no pair."""
    torch.manual_seed(0)
    experts, units, width = 4, 10, 12
    index_TK = torch.stack([torch.randperm(experts - 1)[:2] for _ in range(tokens)])
    x_TD, weights_TK = torch.randn(tokens, width), torch.rand(tokens, 2)
    gate_up, down = torch.randn(experts, 2 * units, width), torch.randn(experts, width, units)
    leaves = [each.double().requires_grad_() for each in (x_TD, weights_TK, gate_up, down, torch.rand(experts, units))]
    x, weights, read, write, masks = leaves

    def one_by_one() -> Tensor:
        out = []
        for token in range(tokens):
            pairs = zip(index_TK[token].tolist(), weights[token], strict=True)
            of = [
                weight * (write[e] @ (masks[e] * F.silu(read[e, :units] @ x[token]) * (read[e, units:] @ x[token])))
                for e, weight in pairs
            ]
            out.append(sum(of))
        return torch.stack(out)

    expected, upstream = one_by_one(), torch.randn(tokens, width, dtype=torch.float64)
    found = experts_output(x, index_TK, weights, gate_up=read, down=write, activation=F.silu, units_EM=masks)
    torch.testing.assert_close(found, expected)
    pairs = zip(*(torch.autograd.grad(out, leaves, upstream) for out in (found, expected)), strict=True)
    for mine, plain in pairs:
        torch.testing.assert_close(mine, plain)
    assert not torch.autograd.grad(one_by_one().sum(), write)[0][-1].any()


def test_gradients_of_masks_are_those_of_finite_differences():
    model = tiny_model("qwen3_moe").double()
    masks, _ = masks_and_target(Shape.of(model.config), GRANULARITIES, fractional=True, seed=3)
    of_experts = ("intermediate", "experts")
    fields = {name: z.double().requires_grad_() for name, z in masks.tensors().items() if name in of_experts}
    others = {name: z.double() for name, z in masks.tensors().items() if name not in fields}
    masked = MaskedModel(model)

    def loss(**z: Tensor) -> Tensor:
        masked.set_masks(Masks(**others, **z))
        return masked.model(tiny_ids()).logits.square().mean()

    found = dict(zip(fields, torch.autograd.grad(loss(**fields), list(fields.values())), strict=True))
    for name, z in fields.items():
        direction = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(0)) * (z != 0)
        ahead, behind = (float(loss(**{**fields, name: z + step * direction}).detach()) for step in (1e-3, -1e-3))
        assert float((found[name] * direction).sum()) == pytest.approx((ahead - behind) / 2e-3, rel=1e-2)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe-rope", "olmoe-clipped"])
def test_moments_of_the_cut_model_are_those_it_would_have_had(family, tied):
    model = tiny_model(family, tied=tied)
    source = Shape.of(model.config)
    masks, target = masks_and_target(source, GRANULARITIES, fractional=False, seed=1)
    selection = Selection.of(masks, source=source, target=target)
    require_moments_of_the_cut(model, masks=masks, selection=selection)


@pytest.mark.parametrize("family", EXPERT_CONFIGS)
def test_the_result_is_an_ordinary_checkpoint(family, tmp_path):
    model = tiny_model(family, tied=False)
    source = Shape.of(model.config)
    masks, target = masks_and_target(source, GRANULARITIES, fractional=False, seed=3)
    planned = config_for(model.config, shape=target, attention_layers=[1, 3])
    assert Shape.of(planned) == target
    small = compact(model, masks=masks, selection=Selection.of(masks, source=source, target=target))
    small.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = tiny_ids()
    torch.testing.assert_close(loaded(ids).logits, small(ids).logits, rtol=0, atol=0)
    generated = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    again = torch.cat([ids, *[generated[:, 16 + place : 17 + place] for place in range(4)]], 1)
    assert generated.shape == (2, 20)
    assert torch.equal(loaded(again[:, :-1]).logits[:, 15:].argmax(-1), generated[:, 16:])  # the cache changes nothing


@pytest.mark.parametrize("family", EXPERT_CONFIGS)
def test_counts_are_those_of_the_real_model(family):
    config = EXPERT_CONFIGS[family](tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape, parameters = Shape.of(config), dict(model.named_parameters())
    assert anatomy_of(model) == shape.family
    assert shape.num_parameters() == sum(p.numel() for p in parameters.values())
    for kind in shape.family.sublayers.values():
        for name, axes in kind.axes.items():
            assert tuple(axis.size(shape.units()) for axis in axes) == tuple(parameters[f"model.layers.0.{name}"].shape)
    of_experts = sum(p.numel() for name, p in parameters.items() if ".experts." in name)
    assert shape.active_parameters() == shape.num_parameters() - of_experts + of_experts * 2 // 6


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_balance_is_that_of_transformers(family):
    """Of one layer and one sequence; of more of them, the mean."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = tiny_model(family)
    balance = RouterBalance.of(model)
    assert balance is not None
    assert balance.coefficient == model.config.router_aux_loss_coef
    with balance.listening() as heard:
        logits = model(tiny_ids(), output_router_logits=True).router_logits
    losses_LB = balance.of_layers(heard, sequences=2)
    for loss_B, of_layer in zip(losses_LB, logits, strict=True):
        for loss, rows in zip(loss_B, of_layer.view(2, 16, 6), strict=True):
            torch.testing.assert_close(loss, load_balancing_loss_func((rows,), 6, 2))
    torch.testing.assert_close(balance.weighed(heard, sequences=2), balance.coefficient * losses_LB.mean(0))


def test_balance_of_a_masked_model_is_that_of_the_cut_one():
    model = tiny_model("qwen3_moe")
    source = Shape.of(model.config)
    masks, target = masks_and_target(source, GRANULARITIES, fractional=False, seed=1)

    def measured(of) -> tuple[Tensor, Tensor]:
        balance = RouterBalance.of(of)
        assert balance is not None
        with balance.listening() as heard:
            of(tiny_ids())
        routers = [p for name, p in of.named_parameters() if "mlp.gate" in name]
        total = balance.weighed(heard, sequences=2).sum()
        return total, torch.stack([g.norm() for g in torch.autograd.grad(total, routers)])

    masked = MaskedModel(model)
    masked.set_masks(masks)
    expected, gradients = measured(masked.model)
    small = compact(masked.release(), masks=masks, selection=Selection.of(masks, source=source, target=target))
    found, of_kept = measured(small.requires_grad_(True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert masks.mlp is not None
    torch.testing.assert_close(of_kept, gradients[masks.mlp > 0], rtol=1e-4, atol=0)


def test_fewer_experts_than_a_token_has_are_refused():
    source = EXPERT_CONFIGS["qwen3_moe"]()
    with pytest.raises(ShearingError, match=r"(?s)num_experts.*2 to 6"):
        resolve_target(TargetRecipe(num_experts=1), source=source)
    assert resolve_target(TargetRecipe(num_experts=2), source=source).num_experts == 2
    with pytest.raises(ShearingError, match="not made of experts"):
        resolve_target(TargetRecipe(num_experts=2), source=tiny_model("llama").config)


def test_widths_that_transformers_cannot_compute_are_refused():
    """Its kernel for all experts at once wants rows of 16 bytes, in bf16 eight numbers."""
    source = EXPERT_CONFIGS["qwen3_moe"]()
    with pytest.raises(ShearingError, match=r"(?s)hidden_size.*multiples of 8.*set hidden_size=32"):
        resolve_target(TargetRecipe(hidden_size=30), source=source)
    with pytest.raises(ShearingError, match=r"(?s)intermediate_size.*multiples of 8.*set intermediate_size=8"):
        resolve_target(TargetRecipe(intermediate_size=5), source=source)


def test_olmoe_heads_and_width_go_together():
    source = EXPERT_CONFIGS["olmoe"]()
    with pytest.raises(ShearingError, match=r"(?s)hidden_size.*OlmoeConfig accepts with 6 heads: hidden_size \[48\]"):
        resolve_target(TargetRecipe(hidden_size=32), source=source)
    target = resolve_target(TargetRecipe(hidden_size=32, num_key_value_heads=2), source=source)
    assert (target.hidden_size, target.num_attention_heads, target.head_dim) == (32, 4, 8)


def test_dense_layers_in_between_are_refused():
    for odd in ({"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}):
        with pytest.raises(ShearingError, match="only models whose MLPs are all experts"):
            anatomy_of(EXPERT_CONFIGS["qwen3_moe"](**odd))


def test_a_layer_with_no_expert_left_writes_nothing():
    """Draws of noisy masks may close all of a layer."""
    model = tiny_model("mixtral")
    masked = MaskedModel(model)
    experts = torch.ones(4, 6)
    experts[1] = 0.0
    masked.set_masks(Masks(experts=experts))
    found = masked.model(tiny_ids()).logits
    masked.set_masks(Masks(mlp=torch.tensor([1.0, 0.0, 1.0, 1.0]), attention=torch.ones(4)))
    torch.testing.assert_close(found, masked.model(tiny_ids()).logits)


def test_masks_of_another_size_are_refused():
    source = Shape.of(EXPERT_CONFIGS["mixtral"]())
    masks = Masks(experts=torch.ones(4, 6))
    with pytest.raises(ShearingError, match="experts, layer 0"):
        Selection.of(masks, source=source, target=dataclasses.replace(source, num_experts=4))
