"""Cutting: fold every mask into the weights it scales, slice, renumber. Exact, for fractional masks too.

Legend: L layers, d hidden, m intermediate, K KV groups, G query heads per group; primes mark the target's sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shearing.errors import ShearingError, key
from shearing.models.anatomy import anatomy_of
from shearing.models.families import Family
from shearing.models.families.axes import Axes, Unit
from shearing.models.families.experts.cutting import columns_of_stack, cut_stack, select_experts
from shearing.models.families.norms import Norm
from shearing.models.masked import Masks
from shearing.models.shape import Shape, config_for
from shearing.models.stored.paging.on_demand import weights_by_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Selection:
    """Which units of the source survive, all index tensors int64 on the CPU and ascending.

    Attributes:
        layers: for each of the L' new layers the source layers of its attention and of its MLP.
        hidden: [d'] residual dimensions.
        kv_groups: [L', K'] KV groups of each new layer.
        query_heads: [L', K', G'] query heads inside each of those groups.
        intermediate: [L', m'] MLP units of each new layer; of a model with experts [L', E', m'], those of each expert.
        experts: [L', E'] experts of each new layer; None: the model has none.
    """

    layers: tuple[tuple[int, int], ...]
    hidden: Tensor
    kv_groups: Tensor
    query_heads: Tensor
    intermediate: Tensor
    experts: Tensor | None = None

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
        if source.family.parallel and any(a != m for a, m in layers):
            raise ShearingError(
                "kept units (sub-layers)",
                value=layers,
                allowed=f"attention and MLP of the same layers: in this {source.family.model_type!r} both read what "
                "their layer reads",
                mend="choose whole layers",
            )
        if any(a > m for a, m in layers) or any(m >= a for (_, m), (a, _) in pairwise(layers)):
            raise ShearingError(
                "kept units (sub-layers)",
                value=layers,
                allowed="attention and MLP sub-layers that alternate in depth",
                mend="select them with shearing.pruning.structured.rounding, which keeps the order that an ordinary "
                "layer has",
            )
        groups, per_group = source.num_key_value_heads, source.query_heads_per_group
        every_group = torch.ones(source.num_hidden_layers, groups, dtype=torch.bool)
        every_head = torch.ones(source.num_hidden_layers, groups, per_group, dtype=torch.bool)
        every_unit = torch.ones(source.num_hidden_layers, source.intermediate_size, dtype=torch.bool)
        kv_groups, query_heads, intermediate, experts = [], [], [], []
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
            if source.num_experts:
                of_layer, units = select_experts(
                    alive,
                    layer=m,
                    sizes=(source.num_experts, source.intermediate_size),
                    keep=(target.num_experts, target.intermediate_size),
                    indices=_indices,
                )
                experts.append(of_layer)
            else:
                row, name = alive.get("intermediate", every_unit)[m], f"intermediate units, layer {m}"
                units = _indices(row, target.intermediate_size, name=name)
            intermediate.append(units)
        every_dimension = torch.ones(source.hidden_size, dtype=torch.bool)
        return cls(
            layers=layers,
            hidden=_indices(alive.get("hidden", every_dimension), target.hidden_size, name="hidden dimensions"),
            kv_groups=torch.stack(kv_groups),
            query_heads=torch.stack(query_heads),
            intermediate=torch.stack(intermediate),
            experts=torch.stack(experts) if experts else None,
        )

    @property
    def digest(self) -> str:
        """Short hash of the units: the same for the same units, however they were chosen."""
        digest = hashlib.blake2b(digest_size=4)
        parts = [torch.tensor(self.layers), self.hidden, self.kv_groups, self.query_heads, self.intermediate]
        for part in parts if self.experts is None else [*parts, self.experts]:
            digest.update(repr(tuple(part.shape)).encode() + part.to(torch.int64).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def shape(self, source: Shape) -> Shape:
        """The shape that is left of `source`."""
        return replace(
            source,
            num_hidden_layers=len(self.layers),
            hidden_size=self.hidden.numel(),
            intermediate_size=self.intermediate.shape[-1],
            num_experts=source.num_experts if self.experts is None else self.experts.shape[1],
            num_attention_heads=self.query_heads.shape[1] * self.query_heads.shape[2],
            num_key_value_heads=self.kv_groups.shape[1],
        )


def _indices(alive: Tensor, count: int, *, name: str) -> Tensor:
    found = alive.nonzero().flatten()
    if found.numel() != count:
        raise ShearingError(
            f"kept units ({name})",
            value=found.numel(),
            allowed=f"exactly {count} units that are not zero, the target's size",
            mend=f"use masks rounded to the target shape; a result of a parameter budget needs {key('uniform')}=true",
        )
    return found


def compact(model: PreTrainedModel, *, masks: Masks, selection: Selection) -> PreTrainedModel:
    """A new, smaller model that computes exactly what `model` computes under `masks`.

    Each mask is folded into the rows and columns that it scales. With tied embeddings the hidden mask is folded
    into the embedding and divided out of the final norm's gain, so that the head reads what it read before.

    Args:
        model: plain source model (release a `MaskedModel` first); not changed. Its weights may come on demand.
        masks: values of the units, on any one device; those outside the selection must be zero.
        selection: the units to keep.

    Returns:
        A plain Hugging Face model of the selection's shape, in the dtype and on the device of `model`; of another
        architecture where that of `model` refuses the shape, see `config_for`.
    """
    from accelerate import init_empty_weights
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    family = anatomy_of(model)
    state = dict(cut_in_turn(model.config, weights_by_name(model), masks=masks, selection=selection))
    config = cut_config(model.config, selection=selection)
    own = type(config) is type(model.config)
    architecture: Any = type(model) if own else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with init_empty_weights(include_buffers=False):
        result: Any = architecture(config)
    if Shape.of(model.config).tied:
        state[f"{family.head}.weight"] = state[f"{family.embedding}.weight"]
    result.load_state_dict(state, strict=True, assign=True)
    result.tie_weights()
    result.generation_config = model.generation_config
    compacted: PreTrainedModel = result.to(model.device).eval()
    return compacted


def cut_config(config: PretrainedConfig, *, selection: Selection) -> PretrainedConfig:
    """The config of the model that is left of a source with this one."""
    shape = selection.shape(Shape.of(config))
    return config_for(config, shape=shape, attention_layers=[a for a, _ in selection.layers])


def cut_in_turn(
    config: PretrainedConfig, weights: Mapping[str, Tensor], *, masks: Masks, selection: Selection
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model that `compact` makes, of which only a layer's exist at a time.

    Args:
        config: the source's.
        weights: of the source, by name; each is asked for when its turn comes.
        masks, selection: see `compact`.

    Returns:
        Name in the cut model and weight, in the dtype and on the device of the source's; each once where it is tied.
    """
    family, source = anatomy_of(config), Shape.of(config)
    scale = _embedding_scale(source, selection.shape(source))
    folds = masks.hidden is not None or scale != 1.0
    embedding = f"{family.embedding}.weight"
    gain: dict[str, Tensor] = {}
    values: Tensor | None = None
    for name, weight in _in_turn(family, weights, masks, selection, source):
        if folds and name == embedding:
            hidden = torch.ones(source.hidden_size, device=weight.device) if masks.hidden is None else masks.hidden
            values = _take(hidden, selection.hidden) * scale
            weight = _scale(weight, columns=values)
        if folds and source.tied and name in {parameter.name for parameter in family.final_norm.parameters}:
            gain[name] = weight
        else:
            yield name, weight
    if gain:
        assert values is not None
        _scale_gain(gain, family.final_norm, by=1.0 / values.double())
        yield from gain.items()


def compact_moments(
    model: PreTrainedModel, moments: Mapping[str, Mapping[str, Tensor]], *, selection: Selection
) -> dict[str, dict[str, Tensor]]:
    """An optimiser's state for each weight that is kept, under the names of the cut model; see `moments_in_turn`.

    Args:
        model: the source model, for its anatomy; its weights are not read.
        moments: kind -> parameter of `model` -> tensor of its shape, or a scalar.
        selection: the units to keep.
    """
    cut: dict[str, dict[str, Tensor]] = {kind: {} for kind in moments}
    for kind, name, moment in moments_in_turn(model.config, moments, selection=selection):
        cut[kind][name] = moment
    return cut


def moments_in_turn(
    config: PretrainedConfig, moments: Mapping[str, Mapping[str, Tensor]], *, selection: Selection
) -> Iterator[tuple[str, str, Tensor]]:
    """An optimiser's state for each weight that is kept, of which only a layer's exists at a time.

    Taken as it is: under masks of 0 and 1 the gradient of a weight that is kept is the same before and after the cut.

    Args:
        config: the source's.
        moments: kind -> parameter of the source -> tensor of its shape, or a scalar; asked for when its turn comes.
        selection: the units to keep.

    Returns:
        Kind, name in the cut model, and moment.
    """
    family, source = anatomy_of(config), Shape.of(config)
    scale = _embedding_scale(source, selection.shape(source))
    final = {parameter.name for parameter in family.final_norm.parameters} if source.tied else set()
    for kind, of_kind in moments.items():
        # A weight that is scaled has a gradient that is divided.
        power = {"exp_avg": 1, "exp_avg_sq": 2}.get(kind, 0)
        for name, moment in _in_turn(family, of_kind, Masks(), selection, source):
            if scale != 1.0 and name in final:
                moment = moment * scale**power
            elif scale != 1.0 and name == f"{family.embedding}.weight":
                moment = moment / scale**power
            yield kind, name, moment


def _embedding_scale(source: Shape, target: Shape) -> float:
    """What an embedding is scaled by when it is cut, so that its family, which may scale by the width, undoes it."""
    scale = source.family.embedding_scale
    return scale(source.hidden_size) / scale(target.hidden_size)


def _cut(weight: Tensor, axes: Axes, units: Mapping[Unit, Tensor], *, sizes: Mapping[Unit, int]) -> Tensor:
    if weight.ndim > 2:
        return cut_stack(weight, axes, units, sizes=sizes)
    for position, axis in enumerate(axes[: weight.ndim]):  # an optimiser's step count has no axes
        kept = axis.kept(units, sizes=sizes)
        if kept is not None:
            weight = weight.index_select(position, kept.to(weight.device))
    return weight.clone()


def _in_turn(
    family: Family, weights: Mapping[str, Tensor], masks: Masks, selection: Selection, source: Shape
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's kept part, sub-layer masks folded in; the hidden mask of the embedding is not."""
    hidden: dict[Unit, Tensor] = {"hidden": selection.hidden}
    for name, axes in family.outer_axes.items():
        if name in weights:
            yield name, _cut(weights[name], axes, hidden, sizes=source.units())
    for new, (attention_layer, mlp_layer) in enumerate(selection.layers):
        yield from _cut_layer(family, weights, masks, selection, source, new, attention_layer, mlp_layer).items()


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
    query_rows, units = _head_rows(heads, source.head_dim), selection.intermediate[new]
    kept: dict[Unit, Tensor] = {
        "hidden": selection.hidden,
        "query_heads": query_rows,
        "kv_groups": _head_rows(groups, source.head_dim),
        "intermediate": units,
    }
    experts = None if selection.experts is None else selection.experts[new]
    if experts is not None:
        kept["experts"] = experts
    z_heads = masks.heads(attention_layer)
    head_columns = None if z_heads is None else _take(_expand(z_heads, source), query_rows)
    if experts is not None:
        unit_columns = columns_of_stack(masks.experts, masks.intermediate, layer=mlp_layer, kept=experts, units=units)
    else:
        unit_columns = None if masks.intermediate is None else _take(masks.intermediate[mlp_layer], units)
    rows = None if masks.hidden is None else _take(masks.hidden, selection.hidden)
    state: dict[str, Tensor] = {}
    for sublayer, layer, z, columns in (
        (family.attention, attention_layer, masks.attention, head_columns),
        (family.mlp, mlp_layer, masks.mlp, unit_columns),
    ):
        cut = {
            name: _cut(weights[old], axes, kept, sizes=source.units())
            for name, axes in sublayer.axes.items()
            if (old := f"{family.layers}.{layer}.{name}") in weights
        }
        z_layer = None if z is None else z[layer].detach()
        if sublayer.after is not None and z_layer is not None:
            _scale_gain(cut, sublayer.after, by=z_layer)
        in_write = None if sublayer.after is not None else z_layer
        for name in sublayer.written:
            if name in cut:
                cut[name] = _scale(
                    cut[name],
                    columns=columns if cut[name].ndim > 1 else None,
                    rows=_both(rows, None if in_write is None else in_write.expand(selection.hidden.numel())),
                )
        state.update({f"{family.layers}.{new}.{name}": weight for name, weight in cut.items()})
    return state


def _both(rows: Tensor | None, others: Tensor | None) -> Tensor | None:
    if rows is None or others is None:
        return others if rows is None else rows
    return rows * others


def _scale_gain(state: dict[str, Tensor], norm: Norm, *, by: Tensor) -> None:
    """Scales what a norm puts out, in place of its parameters in `state`."""
    weight, bias, offset = f"{norm.name}.weight", f"{norm.name}.bias", norm.kind.offset
    by = _factors(by, of=state[weight])
    state[weight] = ((state[weight].double() + offset) * by - offset).to(state[weight].dtype)
    if bias in state:
        state[bias] = (state[bias].double() * by).to(state[bias].dtype)


def _head_rows(heads: Tensor, head_dim: int) -> Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _expand(heads: Tensor, source: Shape) -> Tensor:
    return heads.repeat_interleave(source.num_attention_heads // heads.numel() * source.head_dim)


def _take(values: Tensor, kept: Tensor) -> Tensor:
    return values.detach().index_select(0, kept.to(values.device))


def _scale(weight: Tensor, *, columns: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """Scales in double precision, so that folding adds one rounding and no more."""
    if columns is None and rows is None:
        return weight
    scaled = weight.double()
    if columns is not None:
        scaled = scaled * _factors(columns, of=weight)
    if rows is not None:
        factors = _factors(rows, of=weight)
        scaled = scaled * (factors if scaled.ndim == 1 else factors[:, None])
    return scaled.to(weight.dtype)


def _factors(values: Tensor, *, of: Tensor) -> Tensor:
    """In double precision and where the weight is: masks that a ranking gives are on the host."""
    return values.detach().to(of.device, torch.float64)
