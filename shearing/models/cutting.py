"""Cutting: fold every mask into the weights it scales, slice, renumber. Exact, for fractional masks too.

Legend: L layers, d hidden, m intermediate, K KV groups, G query heads per group; primes mark the target's sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shearing.errors import ShearingError
from shearing.models.anatomy import Axis, Family, anatomy_of
from shearing.models.masked import Masks
from shearing.models.shape import Shape, config_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Selection:
    """Which units of the source survive, all index tensors int64 on the CPU and ascending.

    Attributes:
        layers: for each of the L' new layers the source layers of its attention and of its MLP.
        hidden: [d'] residual dimensions.
        kv_groups: [L', K'] KV groups of each new layer.
        query_heads: [L', K', G'] query heads inside each of those groups.
        intermediate: [L', m'] MLP units of each new layer.
    """

    layers: tuple[tuple[int, int], ...]
    hidden: Tensor
    kv_groups: Tensor
    query_heads: Tensor
    intermediate: Tensor

    @classmethod
    def of(cls, masks: Masks, *, source: Shape, target: Shape) -> Selection:
        """The selection that masks with exactly the target's number of nonzero units describe.

        Raises:
            ShearingError: the masks do not have the target shape; names the granularity and the layer.
        """
        alive = {name: (mask != 0).cpu() for name, mask in masks.tensors().items()}
        everything = torch.ones(source.num_hidden_layers, dtype=torch.bool)
        attention = _indices(alive.get("attention", everything), target.num_hidden_layers, name="attention sub-layers")
        mlp = _indices(alive.get("mlp", everything), target.num_hidden_layers, name="MLP sub-layers")
        layers = tuple(zip(attention.tolist(), mlp.tolist(), strict=True))
        if any(a > m for a, m in layers) or any(m >= a for (_, m), (a, _) in pairwise(layers)):
            raise ShearingError(
                "masks (sub-layers)",
                value=layers,
                allowed="attention and MLP sub-layers that alternate in depth",
                mend="select them with shearing.pruning.structured.rounding, which keeps the order that an ordinary "
                "layer has",
            )
        groups, per_group = source.num_key_value_heads, source.query_heads_per_group
        every_group = torch.ones(source.num_hidden_layers, groups, dtype=torch.bool)
        every_head = torch.ones(source.num_hidden_layers, groups, per_group, dtype=torch.bool)
        every_unit = torch.ones(source.num_hidden_layers, source.intermediate_size, dtype=torch.bool)
        kv_groups, query_heads, intermediate = [], [], []
        for a, m in layers:
            kept = _indices(
                alive.get("kv_groups", every_group)[a], target.num_key_value_heads, name=f"KV groups, layer {a}"
            )
            heads = alive.get("query_heads", every_head)[a]
            name = f"query heads, layer {a}"
            kv_groups.append(kept)
            query_heads.append(
                torch.stack([_indices(heads[group], target.query_heads_per_group, name=name) for group in kept])
            )
            units = alive.get("intermediate", every_unit)[m]
            intermediate.append(_indices(units, target.intermediate_size, name=f"intermediate units, layer {m}"))
        every_dimension = torch.ones(source.hidden_size, dtype=torch.bool)
        return cls(
            layers=layers,
            hidden=_indices(alive.get("hidden", every_dimension), target.hidden_size, name="hidden dimensions"),
            kv_groups=torch.stack(kv_groups),
            query_heads=torch.stack(query_heads),
            intermediate=torch.stack(intermediate),
        )

    def shape(self, source: Shape) -> Shape:
        """The shape that is left of `source`."""
        return replace(
            source,
            num_hidden_layers=len(self.layers),
            hidden_size=self.hidden.numel(),
            intermediate_size=self.intermediate.shape[1],
            num_attention_heads=self.query_heads.shape[1] * self.query_heads.shape[2],
            num_key_value_heads=self.kv_groups.shape[1],
        )


def _indices(alive: Tensor, count: int, *, name: str) -> Tensor:
    found = alive.nonzero().flatten()
    if found.numel() != count:
        raise ShearingError(
            f"masks ({name})",
            value=found.numel(),
            allowed=f"exactly {count} units that are not zero, the target's size",
            mend="use masks rounded to the target shape; a result of a parameter budget needs target.uniform=true",
        )
    return found


def compact(model: PreTrainedModel, *, masks: Masks, selection: Selection) -> PreTrainedModel:
    """A new, smaller model that computes exactly what `model` computes under `masks`.

    Each mask is folded into the rows and columns that it scales. With tied embeddings the hidden mask is folded
    into the embedding and divided out of the final norm's weight, so that the head reads what it read before.

    Args:
        model: plain source model (release a `MaskedModel` first); not changed.
        masks: values of the units; those outside the selection must be zero.
        selection: the units to keep.

    Returns:
        A plain Hugging Face model of the selection's shape, in the dtype and on the device of `model`.
    """
    family = anatomy_of(model)
    source = Shape.of(model.config)
    target = selection.shape(source)
    config = config_for(model.config, shape=target, attention_layers=[a for a, _ in selection.layers])
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = _cut_all(family, weights, masks, selection, source)
    if masks.hidden is not None:
        values = masks.hidden.detach()[selection.hidden.to(masks.hidden.device)]
        embedding, norm = f"{family.embedding}.weight", f"{family.final_norm}.weight"
        state[embedding] = _scale(state[embedding], columns=values)
        if source.tied:
            state[norm] = (state[norm].double() / values.double()).to(state[norm].dtype)

    with torch.device("meta"):
        result: Any = type(model)(config)
    if source.tied:
        state[f"{family.head}.weight"] = state[f"{family.embedding}.weight"]
    result = result.to_empty(device="cpu")
    result.load_state_dict(state, strict=True, assign=True)
    result.tie_weights()
    _restore_buffers(result, config)
    result.generation_config = model.generation_config
    compacted: PreTrainedModel = result.to(model.device).eval()
    return compacted


def compact_moments(
    model: PreTrainedModel, moments: Mapping[str, Mapping[str, Tensor]], *, selection: Selection
) -> dict[str, dict[str, Tensor]]:
    """An optimiser's state for each weight that is kept, under the names of the cut model.

    Taken as it is: under masks of 0 and 1 the gradient of a weight that is kept is the same before and after the cut.

    Args:
        model: the source model, for its anatomy; its weights are not read.
        moments: kind -> parameter of `model` -> tensor of its shape, or a scalar.
        selection: the units to keep.
    """
    family, source = anatomy_of(model), Shape.of(model.config)
    return {kind: _cut_all(family, of_kind, Masks(), selection, source) for kind, of_kind in moments.items()}


def _restore_buffers(model: Any, config: Any) -> None:
    """Recomputes buffers that are not in the state dict (RoPE frequencies), which `to_empty` left undefined."""
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            fresh = type(module)(config=config)
            for name, buffer in fresh.named_buffers(recurse=False):
                module.register_buffer(name, buffer, persistent=False)


@dataclass(frozen=True)
class _Index:
    """Indices to keep on each kind of axis; heads are given as indices of their rows."""

    hidden: Tensor
    query_heads: Tensor | None = None
    kv_groups: Tensor | None = None
    intermediate: Tensor | None = None

    def on(self, axis: Axis) -> Tensor | None:
        kept: Tensor | None = None if axis == "fixed" else getattr(self, axis)
        return kept


def _cut(weight: Tensor, axes: tuple[Axis, ...], index: _Index) -> Tensor:
    for position, axis in enumerate(axes[: weight.ndim]):  # an optimiser's step count has no axes
        kept = index.on(axis)
        if kept is not None:
            weight = weight.index_select(position, kept.to(weight.device))
    return weight.clone()


def _cut_all(
    family: Family, weights: Mapping[str, Tensor], masks: Masks, selection: Selection, source: Shape
) -> dict[str, Tensor]:
    """Every parameter's kept part, sub-layer masks folded in; the hidden mask of the embedding is not."""
    hidden = _Index(hidden=selection.hidden)
    state = {name: _cut(weights[name], axes, hidden) for name, axes in family.outer_axes.items() if name in weights}
    for new, (attention_layer, mlp_layer) in enumerate(selection.layers):
        state.update(_cut_layer(family, weights, masks, selection, source, new, attention_layer, mlp_layer))
    return state


def _cut_layer(
    family: Family,
    weights: Mapping[str, Tensor],
    masks: Masks,
    selection: Selection,
    source: Shape,
    new: int,
    attention_layer: int,
    mlp_layer: int,
) -> dict[str, Tensor]:
    groups, inside = selection.kv_groups[new], selection.query_heads[new]
    heads = (groups[:, None] * source.query_heads_per_group + inside).flatten()
    index = _Index(
        hidden=selection.hidden,
        query_heads=_head_rows(heads, source.head_dim),
        kv_groups=_head_rows(groups, source.head_dim),
        intermediate=selection.intermediate[new],
    )
    columns: dict[str, Tensor | None] = {
        family.attention_write: None if (z := masks.heads(attention_layer)) is None else _expand(z, source),
        family.mlp_write: None if masks.intermediate is None else masks.intermediate[mlp_layer],
    }
    kept_columns = {family.attention_write: index.query_heads, family.mlp_write: index.intermediate}
    sublayer = {
        family.attention_write: None if masks.attention is None else masks.attention[attention_layer],
        family.mlp_write: None if masks.mlp is None else masks.mlp[mlp_layer],
    }
    state = {}
    for layer, axes_of in ((attention_layer, family.attention_axes), (mlp_layer, family.mlp_axes)):
        for name, axes in axes_of.items():
            old = f"{family.layers}.{layer}.{name}"
            if old not in weights:
                continue
            weight = _cut(weights[old], axes, index)
            module, kind = name.rsplit(".", 1)
            if module in columns:
                rows = None if masks.hidden is None else _take(masks.hidden, selection.hidden)
                z_layer = sublayer[module]
                if z_layer is not None:
                    rows = z_layer.detach().expand(weight.shape[0]) if rows is None else rows * z_layer.detach()
                z_columns = columns[module] if kind == "weight" else None
                weight = _scale(
                    weight, columns=None if z_columns is None else _take(z_columns, kept_columns[module]), rows=rows
                )
            state[f"{family.layers}.{new}.{name}"] = weight
    return state


def _head_rows(heads: Tensor, head_dim: int) -> Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _expand(heads: Tensor, source: Shape) -> Tensor:
    return heads.repeat_interleave(source.num_attention_heads // heads.numel() * source.head_dim)


def _take(values: Tensor, kept: Tensor | None) -> Tensor:
    assert kept is not None
    return values.detach().index_select(0, kept.to(values.device))


def _scale(weight: Tensor, *, columns: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """Scales in double precision, so that folding adds one rounding and no more."""
    if columns is None and rows is None:
        return weight
    scaled = weight.double()
    if columns is not None:
        scaled = scaled * columns.detach().double()
    if rows is not None:
        scaled = scaled * (rows.double() if scaled.ndim == 1 else rows.double()[:, None])
    return scaled.to(weight.dtype)
