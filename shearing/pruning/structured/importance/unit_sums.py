"""What each unit owns of every matrix: sums over rows and columns, by the declared axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.families.axes import HIDDEN, Axes, Unit
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import unit_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unit_sums(
    model: PreTrainedModel,
    *,
    of: Callable[[nn.Parameter], Tensor],
    of_vector: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, Tensor]:
    """Sums over the entries of all matrices that each unit owns; vectors (biases, gains) count for nobody.

    Args:
        model: of any family.
        of: what is summed: from a matrix of the model to as many numbers, fp64 on the CPU.
        of_vector: what a row or column of a matrix counts for, from the sum over its entries, entry by entry. A
            sub-layer's sum is over the rows and columns of its units.

    Returns:
        By granularity, as `Scores` but fp64.
    """
    family = anatomy_of(model)
    source = Shape.of(model.config)
    K, G, dh = source.num_key_value_heads, source.query_heads_per_group, source.head_dim
    hidden = torch.zeros(source.hidden_size, dtype=torch.float64)
    query, groups, units, experts = [], [], [], []
    sublayers: dict[str, list[Tensor]] = {"attention": [], "mlp": []}
    outside = dict(model.named_parameters())
    for name, axes in family.outer_axes.items():
        parameter = outside.get(name)
        if parameter is not None and parameter.ndim == 2:
            hidden += of_vector(of(parameter).sum(1 - axes.index(HIDDEN)))
    for layer in decoder_layers(model):
        parameters = dict(layer.named_parameters())
        by_unit: dict[Unit, Tensor] = {
            "query_heads": torch.zeros(source.num_attention_heads * dh, dtype=torch.float64),
            "kv_groups": torch.zeros(K * dh, dtype=torch.float64),
            "intermediate": torch.zeros(unit_sizes(source)["intermediate"][1:], dtype=torch.float64),
            "experts": torch.zeros(source.num_experts, dtype=torch.float64),
            "hidden": hidden,
        }
        for kind, sublayer in family.sublayers.items():
            total = torch.zeros((), dtype=torch.float64)
            for name, axes in sublayer.axes.items():
                if name not in parameters or parameters[name].ndim < 2:
                    continue
                values = of(parameters[name])
                if values.ndim > 2:
                    total += _add_stack(by_unit, values, axes, of_vector=of_vector, source=source)
                    continue
                for position, axis in enumerate(axes):
                    of_axis = of_vector(values.sum(1 - position))
                    for unit, where in axis.places(source.units()):
                        by_unit[unit] += of_axis[where]
                    if axis != HIDDEN:
                        total += of_axis.sum()
            sublayers[kind].append(total)
        heads = by_unit["query_heads"].view(K, G, dh).sum(-1)
        query.append(heads)
        groups.append(heads.sum(-1) + by_unit["kv_groups"].view(K, dh).sum(-1))
        units.append(by_unit["intermediate"])
        experts.append(by_unit["experts"])
    attention, mlp = (torch.stack(sublayers[kind]) for kind in ("attention", "mlp"))
    return {
        "attention": attention,
        "mlp": mlp,
        "layers": attention + mlp,
        "kv_groups": torch.stack(groups),
        "query_heads": torch.stack(query),
        "intermediate": torch.stack(units),
        **({"experts": torch.stack(experts)} if source.num_experts else {}),
        "hidden": hidden,
    }


def _add_stack(
    by_unit: dict[Unit, Tensor],
    values: Tensor,
    axes: Axes,
    *,
    of_vector: Callable[[Tensor], Tensor],
    source: Shape,
) -> Tensor:
    """Adds what lies in a stack of all experts' matrices [E, O, I]; returns the sub-layer's sum."""
    total = torch.zeros((), dtype=torch.float64)
    for position, axis in enumerate(axes[1:]):
        of_axis = of_vector(values.sum(2 - position))
        for unit, where in axis.places(source.units()):
            by_unit[unit] += of_axis[:, where].sum(0) if unit == "hidden" else of_axis[:, where]
        if axis != HIDDEN:
            by_unit["experts"] += of_axis.sum(1)
            total += of_axis.sum()
    return total
