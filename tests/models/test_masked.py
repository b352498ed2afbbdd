"""The masked model: gradients, both ways of applying masks, no wait for the device, checkpointing and compilation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shearing.errors import ShearingError
from shearing.models import masked as masked_module
from shearing.models.attention import drop_attention_mask
from shearing.models.families.norms import LAYER
from shearing.models.masked import MaskedLinear, MaskedModel, Masks
from shearing.models.shape import Shape
from tests.models.test_exactness import GRANULARITIES, masks_and_target
from tests.models.tiny import tiny_ids, tiny_model


def reference(x, weight, bias, columns, rows):
    """The same map written with ordinary differentiable operations."""
    y = F.linear(x * columns if columns is not None else x, weight, bias)
    return y * rows if rows is not None else y


@pytest.mark.parametrize("tokens", [3, 40], ids=["activations", "weights"])
@pytest.mark.parametrize("with_columns", [False, True])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_masked_linear_gradients(tokens, with_columns, with_rows, with_bias):
    generator = torch.Generator().manual_seed(0)

    def leaf(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()

    linear = nn.Linear(7, 5, bias=with_bias, dtype=torch.float64)
    layer = MaskedLinear(linear)
    x = leaf(tokens, 7)
    layer.columns = leaf(7) if with_columns else None
    layer.rows = leaf(5) if with_rows else None
    leaves = [t for t in (x, layer.weight, layer.bias, layer.columns, layer.rows) if t is not None]
    cotangent = torch.randn(tokens, 5, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(layer(x), leaves, cotangent)
    expected = torch.autograd.grad(reference(x, layer.weight, layer.bias, layer.columns, layer.rows), leaves, cotangent)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_masked_linear_keeps_no_copy_for_the_backward_pass():
    layer = MaskedLinear(nn.Linear(16, 8))
    layer.columns, layer.rows = torch.rand(16).requires_grad_(), torch.rand(8).requires_grad_()
    x = torch.randn(32, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        layer(x)
    own = {t.data_ptr() for t in (x, layer.weight, layer.bias, layer.columns, layer.rows)}
    assert set(saved) <= own


def test_autocast_computes_in_bf16_and_returns_fp32_gradients():
    layer = MaskedLinear(nn.Linear(16, 8))
    layer.columns, layer.rows = torch.rand(16).requires_grad_(), torch.rand(8).requires_grad_()
    x = torch.randn(32, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    leaves = (x, layer.weight, layer.columns, layer.rows)
    assert all(t.grad.dtype == torch.float32 for t in leaves)
    exact = [t.grad.clone() for t in leaves]
    for t in leaves:
        t.grad = None
    reference(x, layer.weight, layer.bias, layer.columns, layer.rows).square().sum().backward()
    for a, t in zip(exact, leaves, strict=True):
        assert (a - t.grad).norm() / t.grad.norm() < 0.03


def test_open_masks_are_the_dense_model():
    model = tiny_model()
    ids = tiny_ids()
    dense = model(ids).logits
    source = Shape.of(model.config)
    ones = Masks(
        hidden=torch.ones(36),
        attention=torch.ones(4),
        mlp=torch.ones(4),
        kv_groups=torch.ones(4, 3),
        query_heads=torch.ones(4, 3, source.query_heads_per_group),
        intermediate=torch.ones(4, 40),
    )
    wrapped = MaskedModel(model)
    for masks in (ones, None):
        wrapped.set_masks(masks)
        torch.testing.assert_close(wrapped.model(ids).logits, dense, rtol=1e-5, atol=1e-5)
    assert {id(p) for p in wrapped.release().parameters()} == {id(p) for p in model.parameters()}
    torch.testing.assert_close(model(ids).logits, dense, rtol=0, atol=0)


def test_the_state_dict_keeps_hugging_face_names():
    model = tiny_model("qwen2", tied=False)
    names = set(model.state_dict())
    assert set(MaskedModel(model).model.state_dict()) == names


class _NoHostSync(TorchDispatchMode):
    """Fails on operations that read a value on the host or whose output's shape depends on one."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "index.Tensor", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.FORBIDDEN), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_no_host_sync_and_no_square_mask(family):
    model = tiny_model(family)
    source = Shape.of(model.config)
    masks, _ = masks_and_target(source, GRANULARITIES, fractional=True, seed=0)
    drop_attention_mask(model, sequence_length=16)
    wrapped = MaskedModel(model)
    ids = tiny_ids(length=16)
    with _NoHostSync():
        wrapped.set_masks(masks)
        hidden = wrapped(ids)
        hidden.sum().backward()


def test_gradients_reach_every_mask_and_survive_activation_checkpointing():
    model = tiny_model()
    source = Shape.of(model.config)
    drawn, _ = masks_and_target(source, GRANULARITIES, fractional=True, seed=0)
    gradients = []
    for checkpointing in (False, True):
        leaves = {name: t.clone().requires_grad_() for name, t in drawn.tensors().items()}
        wrapped = MaskedModel(model)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wrapped.set_masks(Masks(**leaves))
        wrapped(tiny_ids()).square().mean().backward()
        gradients.append({name: t.grad for name, t in leaves.items()})
        wrapped.release()
    for name in gradients[0]:
        assert gradients[0][name].abs().sum() > 0, name
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


@pytest.mark.parametrize("granularity", ["query_heads", "kv_groups"])
@pytest.mark.parametrize("family", ["olmo2", "olmo3"])
def test_a_layer_without_heads_writes_nothing_where_norms_go_over_all_of_them(family: str, granularity: str) -> None:
    model, ids = tiny_model(family), tiny_ids()
    source, layer = Shape.of(model.config), 1
    sizes = {"kv_groups": [source.num_key_value_heads]}
    sizes["query_heads"] = [*sizes["kv_groups"], source.query_heads_per_group]
    mask = torch.ones(source.num_hidden_layers, *sizes[granularity])
    mask[layer] = 0.0
    mask.requires_grad_()
    wrapped = MaskedModel(model)
    wrapped.set_masks(Masks(**{granularity: mask}))
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    assert mask.grad is not None
    assert mask.grad.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    dense = wrapped.release()
    with torch.no_grad():
        dense.get_submodule(f"model.layers.{layer}.self_attn.o_proj").weight.zero_()
        torch.testing.assert_close(logits, dense(input_ids=ids).logits)


def test_masks_are_put_into_a_model_once_and_act_until_they_are_taken_off() -> None:
    model = tiny_model()
    first = MaskedModel(model)
    with pytest.raises(ShearingError, match="masked already") as raised:
        MaskedModel(model)
    assert raised.value.field == "model"
    first.release()
    second = MaskedModel(model)
    with pytest.raises(ShearingError, match="taken off"):
        first.set_masks(None)
    first.release()
    with pytest.raises(ShearingError, match="masked already"):
        MaskedModel(model)
    second.release()


@pytest.mark.slow
def test_compiled_layers_take_new_masks_without_recompiling():
    model = tiny_model()
    source = Shape.of(model.config)
    wrapped = MaskedModel(model)
    ids = tiny_ids()
    eager, compiled = [], []
    draws = [masks_and_target(source, GRANULARITIES, fractional=True, seed=seed)[0] for seed in range(3)]
    for masks in draws:
        wrapped.set_masks(masks)
        eager.append(wrapped(ids).detach())
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    for masks in draws:
        wrapped.set_masks(masks)
        with torch._dynamo.config.patch(error_on_recompile=len(compiled) > 0):
            compiled.append(wrapped(ids).detach())
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_divisor_is_the_number_of_alive_dimensions():
    model = tiny_model()
    wrapped = MaskedModel(model)
    hidden = torch.zeros(36)
    hidden[:24] = 1.0
    wrapped.set_masks(Masks(hidden=hidden))
    norm = model.model.norm
    assert isinstance(norm, masked_module.MaskedNorm)
    x = torch.randn(2, 36) * hidden
    expected = F.rms_norm(x[:, :24], (24,), norm.weight[:24], norm.epsilon)
    torch.testing.assert_close(norm(x)[:, :24], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_centred_norm_is_the_layer_norm_of_what_is_there(dtype):
    """Forward and backward, of streams far from their mean too; what is not there reads nothing and writes nothing.

    Its entries of x have a gradient of their own, by which a closed unit's score can tell what it would bring: that of
    y times gain and inverse deviation, as a norm of squares gives it. It takes nothing from what is there.
    """
    torch.manual_seed(0)
    inside = (torch.arange(40) % 5 > 1).float()
    norm = torch.nn.LayerNorm(40, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    masked = masked_module.MaskedNorm(norm, kind=LAYER)
    masked.inside, masked.alive = inside, inside.sum()
    kept = inside.bool()
    for shift, scale in ((0.0, 1.0), (3.0, 1.0), (0.0, 1e-3)):
        x = ((torch.randn(2, 7, 40) * scale + shift) * inside).to(dtype).requires_grad_()
        upstream = (torch.randn(2, 7, 40) * inside).to(dtype)
        y = masked(x)
        assert y.dtype == dtype
        expected = F.layer_norm(x[..., kept].float(), (24,), norm.weight[kept].float(), norm.bias[kept].float(), 1e-5)
        near = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(y[..., kept].float(), expected, **near)
        assert not y[..., ~kept].any()
        leaves = [x, norm.weight, norm.bias]
        mine = torch.autograd.grad(y, leaves, upstream)
        plain = torch.autograd.grad(expected, leaves, upstream[..., kept].float())
        for found, wanted in zip(mine, plain, strict=True):
            assert found.dtype == dtype
            off = float((found.float() - wanted.float()).abs().max())
            assert off <= near["rtol"] * float(wanted.float().abs().max())
        everywhere = upstream + (torch.randn(2, 7, 40) * (1 - inside)).to(dtype)
        of_x, *of_weights = torch.autograd.grad(masked(x), leaves, everywhere)
        assert all(torch.equal(found, before) for found, before in zip(of_weights, mine[1:], strict=True))
        torch.testing.assert_close(of_x[..., kept], mine[0][..., kept], rtol=0, atol=0)
        inverse = (x[..., kept].float().var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
        direct = everywhere.float() * norm.weight.float() * inverse
        torch.testing.assert_close(of_x[..., ~kept].float(), direct[..., ~kept], rtol=near["rtol"] * 3, atol=1e-4)
