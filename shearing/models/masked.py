"""The masked model: a dense model with rescaled output projections.

Only the writes into the residual stream are masked: columns of `o_proj` and `down_proj` by the heads' and
intermediate units' masks, their rows by the hidden and layer masks, and the embedding's output by the hidden
mask. The residual stream then is masked already, and RMSNorm needs no more than the number of alive
dimensions as its divisor. Where a norm stands between a write and the residual stream, which would undo any
scale, it is this norm's gain that the layer mask scales. Experts are masked as `families.experts.masked`
says. Nothing has a dynamic shape and nothing waits for the device.

Legend: B sequences, S positions, L layers, d hidden, m intermediate, K KV groups, G query heads per group,
dh head dimension; T = B*S tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shearing.errors import ShearingError
from shearing.models.anatomy import Head, anatomy_of, backbone, head_of
from shearing.models.families.axes import Unit
from shearing.models.families.experts.masked import MaskedExperts, MaskedRouter
from shearing.models.families.family import SubLayer
from shearing.models.families.norms import Norm, NormKind
from shearing.models.shape import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Wrapper = TypeVar("Wrapper", bound=nn.Module)


@dataclass(frozen=True)
class Masks:
    """Mask values in [0, 1], fp32; a field that is None leaves its dimension as it is.

    Attributes:
        hidden: [d], one for the whole residual stream.
        attention, mlp: [L], sub-layers; the same tensor when whole layers are masked.
        kv_groups: [L, K], a KV head with all of its query heads.
        query_heads: [L, K, G], query heads inside their group.
        intermediate: [L, m]; of a model with experts [L, E, m].
        experts: [L, E].
    """

    hidden: Tensor | None = None
    attention: Tensor | None = None
    mlp: Tensor | None = None
    kv_groups: Tensor | None = None
    query_heads: Tensor | None = None
    intermediate: Tensor | None = None
    experts: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are set, by name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def to(self, device: torch.device) -> Masks:
        """The same values on a device."""
        return Masks(**{name: mask.to(device) for name, mask in self.tensors().items()})

    def heads(self, layer: int) -> Tensor | None:
        """Mask [K*G] of one layer's query heads, in Hugging Face's order (group by group)."""
        if self.query_heads is None:
            return None if self.kv_groups is None else self.kv_groups[layer]
        inside = self.query_heads[layer]
        return (inside if self.kv_groups is None else inside * self.kv_groups[layer][:, None]).flatten()


class _MaskedLinear(torch.autograd.Function):
    """y = rows ⊙ (W (columns ⊙ x) + bias), keeping nothing for the backward pass but x and W themselves.

    The masks multiply the weight when there are more tokens than the weight has rows (cost ∝ parameters), and
    the activations otherwise (cost ∝ tokens).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        fold = x.numel() // x.shape[-1] > weight.shape[0]
        with torch.autocast(x.device.type, enabled=False):
            x_cast = x.to(dtype)
            scaled_bias = None if bias is None else (bias if rows is None else bias * rows).to(dtype)
            if fold:
                y = F.linear(x_cast, _fold(weight, columns, rows).to(dtype), scaled_bias)
            else:
                y = F.linear(x_cast if columns is None else x_cast * columns.to(dtype), weight.to(dtype))
                # Not in place: selective checkpointing may have kept the product for the backward pass.
                y = y if rows is None else y * rows.to(dtype)
                y = y if scaled_bias is None else y + scaled_bias
        ctx.save_for_backward(x, weight, bias, columns, rows)
        ctx.fold, ctx.dtype = fold, dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, columns, rows = ctx.saved_tensors
        dtype = ctx.dtype
        need_x, need_weight, need_bias, need_columns, need_rows = ctx.needs_input_grad
        grad_TO = grad_outputs[0].reshape(-1, weight.shape[0]).to(dtype)
        x_TI = x.reshape(-1, weight.shape[1]).to(dtype)

        grad_x = grad_weight = grad_bias = grad_columns = grad_rows = None
        if need_x:
            if ctx.fold:
                grad_TI = grad_TO @ _fold(weight, columns, rows).to(dtype)
            else:
                grad_TI = (grad_TO if rows is None else grad_TO * rows.to(dtype)) @ weight.to(dtype)
                grad_TI = grad_TI if columns is None else grad_TI.mul_(columns.to(dtype))
            grad_x = grad_TI.reshape(x.shape).to(x.dtype)
        if need_weight or need_columns or need_rows:
            outer_OI = (grad_TO.T @ x_TI).to(weight.dtype)
            if need_columns or need_rows:
                # In the masks' precision, which is fp32 also where the weights are bf16.
                product_OI = outer_OI.to(_dtype_of(columns, rows)) * weight
                if need_columns:
                    grad_columns = product_OI.sum(0) if rows is None else rows @ product_OI
                if need_rows:
                    grad_rows = product_OI.sum(1) if columns is None else product_OI @ columns
                    if bias is not None:
                        grad_rows = grad_rows + grad_TO.sum(0, dtype=grad_rows.dtype) * bias
            if need_weight:
                grad_weight = outer_OI if columns is None else outer_OI.mul_(columns)
                grad_weight = grad_weight if rows is None else grad_weight.mul_(rows[:, None])
        if bias is not None and need_bias:
            total_O = grad_TO.sum(0, dtype=bias.dtype)
            grad_bias = total_O if rows is None else (total_O * rows).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, grad_columns, grad_rows


def _dtype_of(columns: Tensor | None, rows: Tensor | None) -> torch.dtype:
    mask = columns if rows is None else rows
    assert mask is not None
    return mask.dtype


def _fold(weight: Tensor, columns: Tensor | None, rows: Tensor | None) -> Tensor:
    if columns is None:
        return weight if rows is None else weight * rows[:, None]
    folded = weight * columns
    return folded if rows is None else folded.mul_(rows[:, None])


class MaskedLinear(nn.Module):
    """A linear layer [O, I] that writes into the residual stream; shares its parameters with the original.

    `columns` [I] scales what it reads, `rows` [O] what it writes; None leaves that side as it is.
    """

    columns: Tensor | None
    rows: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.columns = self.rows = None

    def forward(self, x: Tensor) -> Tensor:
        if self.columns is None and self.rows is None:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = _MaskedLinear.apply(x, self.weight, self.bias, self.columns, self.rows)  # type: ignore[no-untyped-call]
        return y


class _CentredNorm(torch.autograd.Function):
    """y = gain ⊙ (x - μ) / sqrt(σ² + ε) + bias, with mean μ and variance σ² of the n entries that are there.

    Where the others are zero, both follow from the mean m and the variance v of all d, with k = d / n: μ = k m and
    σ² = k (v + m²) - μ². So torch's own norm computes y but for a factor and a summand of each token, and its gradient
    but for a factor and a multiple of that of y; what it takes beyond torch's is done in place, on [T, d] that are new.
    Of what is not there y is 0, and so are the gradients of gain and bias. That of x is its direct term alone,
    gain / sqrt(σ² + ε) times that of y, as a norm of squares has it where x is 0: by it a closed unit's mask is told
    what the unit would bring. No weight is, as the rows of writes are 0 there. What is kept for the backward pass is x,
    as torch's norm keeps it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, bias: Tensor | None, inside: Tensor, alive: Tensor, epsilon: float
    ) -> Tensor:
        width = x.shape[-1]
        with torch.autocast(x.device.type, enabled=False):
            k = width / alive
            gain_d = gain * inside
            y_Td, mean_T1, inverse_T1 = torch.native_layer_norm(
                x.reshape(-1, width).to(torch.float32), [width], gain_d, None, epsilon
            )
            mean_of_alive_T1 = k * mean_T1
            variance_T1 = k * (inverse_T1.pow(-2) - epsilon + mean_T1.square()) - mean_of_alive_T1.square()
            inverse_of_alive_T1 = (variance_T1 + epsilon).rsqrt()
            y_Td.mul_(inverse_of_alive_T1 / inverse_T1)
            shift_T1 = (mean_T1 - mean_of_alive_T1) * inverse_of_alive_T1
            if bias is None:
                y_Td.addmm_(shift_T1, gain_d[None])
            else:
                # Both outer products in one pass.
                y_Td.addmm_(torch.cat([shift_T1, torch.ones_like(shift_T1)], -1), torch.stack([gain_d, bias * inside]))
        ctx.save_for_backward(x, mean_of_alive_T1, inverse_of_alive_T1, gain, bias, inside, alive)
        return y_Td.view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, mean_T1, inverse_T1, gain, bias, inside, alive = ctx.saved_tensors
        width = x.shape[-1]
        grad_Td, x_Td = (each.reshape(-1, width).to(torch.float32) for each in (grad_outputs[0], x))
        k, gain_d = width / alive, gain * inside
        grad_x, grad_gain, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad_Td, x_Td, [width], mean_T1, inverse_T1, gain_d, bias, list(ctx.needs_input_grad[:3])
        )
        if grad_x is not None:
            # Torch divides what it takes off by d and not by n.
            grad_x = grad_x.mul_(k * inside).addcmul_(grad_Td * (gain * (1 - k * inside)), inverse_T1)
            grad_x = grad_x.view(x.shape).to(x.dtype)
        grad_gain, grad_bias = (None if each is None else each * inside for each in (grad_gain, grad_bias))
        return grad_x, grad_gain, grad_bias, None, None, None


class MaskedNorm(nn.Module):
    """A norm over an axis some of whose entries are pruned: it computes what it would without them.

    Shares its parameters with the original. `alive`, a scalar tensor on the device, is the number of entries that are
    not pruned, at least 1, or None for the full width. `inside` [width] is one for those and zero for the others; it
    may be None where the others are zero already and no mean is taken from them. A norm that takes the mean has
    `inside` wherever it has `alive`, and reads zeros where `inside` is zero. `scale`, a scalar tensor, scales what
    comes out.
    """

    bias: Tensor | None
    alive: Tensor | None
    inside: Tensor | None
    scale: Tensor | None

    def __init__(self, norm: nn.Module, *, kind: NormKind) -> None:
        super().__init__()
        weight, bias, epsilon = norm.weight, getattr(norm, "bias", None), getattr(norm, kind.epsilon)
        assert isinstance(weight, nn.Parameter)
        assert isinstance(epsilon, float)
        self.weight = weight
        self.register_parameter("bias", bias)
        self.epsilon = epsilon
        self.kind = kind
        self.alive = self.inside = self.scale = None

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        gain: Tensor = self.kind.offset + self.weight.float() if self.kind.offset else self.weight
        if self.scale is not None:
            gain, bias = gain * self.scale, None if bias is None else bias * self.scale
        if not self.kind.centred:
            return self._of_squares(x, gain, bias)
        gain, bias = gain.float(), None if bias is None else bias.float()
        if self.inside is None:
            return F.layer_norm(x.float(), x.shape[-1:], gain, bias, self.epsilon).to(x.dtype)
        assert self.alive is not None
        y: Tensor = _CentredNorm.apply(x, gain, bias, self.inside, self.alive, self.epsilon)  # type: ignore[no-untyped-call]
        return y

    def _of_squares(self, x: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x if self.inside is None else x * self.inside
        squares = x.pow(2)
        mean = squares.mean(-1, keepdim=True) if self.alive is None else squares.sum(-1, keepdim=True) / self.alive
        x = x * torch.rsqrt(mean + self.epsilon)
        y = gain * (x if self.kind.gain_in_fp32 else x.to(dtype))
        if bias is not None:
            y = y + (bias if self.inside is None else bias * self.inside)
        return y.to(dtype) if self.kind.gain_in_fp32 else y


class MaskedEmbedding(nn.Module):
    """Token embedding [V, d] whose output is scaled by the hidden mask [d], and by what its family scales it by."""

    hidden: Tensor | None

    def __init__(self, embedding: nn.Embedding, *, scale: float) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.padding_idx = embedding.padding_idx
        self.scale = scale
        self.hidden = None

    def forward(self, input_ids: Tensor) -> Tensor:
        x = F.embedding(input_ids, self.weight, self.padding_idx)
        # In the dtype of x, as Hugging Face rounds it.
        x = x if self.scale == 1.0 else x * torch.full((), self.scale, dtype=x.dtype, device=x.device)
        return x if self.hidden is None else x * self.hidden.to(x.dtype)


@dataclass(frozen=True)
class _SubLayer:
    """Wrapped modules of a sub-layer: its write, the norm after it, and norms along heads with what lies along them.

    Of one that is made of experts, `write` computes them, and `router` chooses.
    """

    write: MaskedLinear | MaskedExperts
    after: MaskedNorm | None
    inside: tuple[tuple[Unit, MaskedNorm], ...]
    router: MaskedRouter | None


class MaskedModel(nn.Module):
    """A Hugging Face causal language model whose writes are masked; the model is changed in place.

    The parameters stay the model's own, under the same names below `model.`; `release` undoes the change.

    Attributes:
        model: the model.
        masks: those of `set_masks`.

    Raises:
        ShearingError: the model is masked already, or its family is not known.
    """

    model: PreTrainedModel
    masks: Masks

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        family = anatomy_of(model)
        if isinstance(model.get_submodule(family.embedding), MaskedEmbedding):
            raise ShearingError(
                "model",
                value=f"a {type(model).__name__} that is masked already",
                allowed="a plain model: masks are put into its layers once",
                mend="take the first masks off it, by `MaskedModel.release` or `Masking.cut`, or load the model anew",
            )
        shape = Shape.of(model.config)
        self.model = model
        self._released = False
        self.masks = Masks()
        self._head_dim = shape.head_dim
        self._hidden_size = shape.hidden_size  # not read from a weight, whose shape is 0 while it is sharded
        self._query_heads_per_group = shape.query_heads_per_group
        self._originals: dict[str, nn.Module] = {}
        scale = family.embedding_scale(shape.hidden_size)
        self._embedding = self._swap(family.embedding, partial(MaskedEmbedding, scale=scale))
        self._norms = [self._swap_norm(family.final_norm, prefix="")]
        layers = [f"{family.layers}.{layer}." for layer in range(shape.num_hidden_layers)]
        self._attention = [self._swap_sublayer(family.attention, prefix=layer) for layer in layers]
        self._mlp = [self._swap_sublayer(family.mlp, prefix=layer) for layer in layers]

    def _swap_sublayer(self, sublayer: SubLayer, *, prefix: str) -> _SubLayer:
        """Wraps what masks concern; norms along the residual stream are added to `_norms`."""
        experts = sublayer.experts
        write: MaskedLinear | MaskedExperts
        if experts is None:
            write, router = self._swap(prefix + sublayer.write, MaskedLinear), None
        else:
            route = partial(
                MaskedRouter,
                normalises=experts.normalises(self.model.config),
                weights_in_fp32=experts.weights_in_fp32,
            )
            write, router = (
                self._swap(prefix + sublayer.write, MaskedExperts),
                self._swap(prefix + experts.router, route),
            )
        before, after = (
            None if norm is None else self._swap_norm(norm, prefix=prefix) for norm in (sublayer.before, sublayer.after)
        )
        self._norms += [norm for norm in (before, after) if norm is not None]
        along_heads = [norm for norm in sublayer.inside if not norm.by_head]
        inside = tuple((norm.over.segments[0], self._swap_norm(norm, prefix=prefix)) for norm in along_heads)
        return _SubLayer(write, after, inside, router)

    def _swap_norm(self, norm: Norm, *, prefix: str) -> MaskedNorm:
        return self._swap(prefix + norm.name, partial(MaskedNorm, kind=norm.kind))

    def _swap(self, name: str, wrapper: Callable[[Any], Wrapper]) -> Wrapper:
        original = self.model.get_submodule(name)
        wrapped = wrapper(original)
        self._originals[name] = original
        self.model.set_submodule(name, wrapped)
        return wrapped

    def set_masks(self, masks: Masks | None) -> None:
        """Masks for the following forward passes and their backward passes; None: the dense model.

        The tensors may require gradients. No value is read on the host.

        Raises:
            ShearingError: the masks were taken off the model, which goes on without any.
        """
        if self._released:
            raise ShearingError(
                "masks",
                value="of a model that they were taken off",
                allowed="masks until `MaskedModel.release` or `Masking.cut`",
                mend="cut when training is done; to go on, make new masks on the model",
            )
        self.masks = masks = masks or Masks()
        hidden = masks.hidden
        self._embedding.hidden = hidden
        inside = None if hidden is None else (hidden > 0).to(torch.float32)
        alive = None if inside is None else inside.sum()
        for norm in self._norms:
            norm.alive = alive
            norm.inside = inside if norm.kind.centred else None
        repeats = self._head_dim * (self._query_heads_per_group if masks.query_heads is None else 1)
        for layer, (attention, mlp) in enumerate(zip(self._attention, self._mlp, strict=True)):
            heads = masks.heads(layer)
            columns = None if heads is None else heads.repeat_interleave(repeats)
            self._mask_write(attention, masks.attention, columns=columns, hidden=hidden, layer=layer)
            columns = None if masks.intermediate is None else masks.intermediate[layer]
            self._mask_write(mlp, masks.mlp, columns=columns, hidden=hidden, layer=layer)
            if mlp.router is not None:
                assert isinstance(mlp.write, MaskedExperts)
                mlp.write.experts = None if masks.experts is None else masks.experts[layer]
                mlp.router.alive = mlp.write.experts
                mlp.router.counts = None if masks.mlp is None else (masks.mlp[layer] > 0).to(torch.float32)
            groups = None if masks.kv_groups is None else masks.kv_groups[layer].repeat_interleave(self._head_dim)
            for unit, norm in attention.inside:
                values = attention.write.columns if unit == "query_heads" else groups
                norm.inside = None if values is None else (values > 0).to(torch.float32)
                # Of none, what goes in is 0, and so comes out; divided by 0 it would be NaN.
                norm.alive = None if norm.inside is None else norm.inside.sum().clamp(min=1)

    def _mask_write(
        self, of: _SubLayer, sublayer: Tensor | None, *, columns: Tensor | None, hidden: Tensor | None, layer: int
    ) -> None:
        of.write.columns = columns
        if of.after is None:
            of.write.rows = _rows(hidden, sublayer, layer=layer, width=self._hidden_size)
        else:
            of.write.rows = hidden
            of.after.scale = None if sublayer is None else sublayer[layer]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Hidden states [B, S, d] after the final norm, of `input_ids` [B, S]."""
        hidden: Tensor = backbone(self.model)(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden

    def head(self) -> Head:
        """What makes logits of those."""
        return head_of(self.model)

    def release(self) -> PreTrainedModel:
        """Puts the original modules back and returns the model; there are no masks in it afterwards."""
        if not self._released:  # others may have masked it by now
            for name, original in self._originals.items():
                self.model.set_submodule(name, original)
        self._released = True
        return self.model


def _rows(hidden: Tensor | None, sublayer: Tensor | None, *, layer: int, width: int) -> Tensor | None:
    if sublayer is None:
        return hidden
    return sublayer[layer].expand(width) if hidden is None else hidden * sublayer[layer]
