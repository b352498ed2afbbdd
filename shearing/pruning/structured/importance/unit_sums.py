"""What each unit owns of every matrix: sums over rows and columns, by the declared axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shearing.models.anatomy import anatomy_of
from shearing.models.families.axes import HIDDEN, Unit
from shearing.models.shape import Shape
from shearing.models.stored.paged import layers_in_turn

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
    query, groups, units = [], [], []
    sublayers: dict[str, list[Tensor]] = {"attention": [], "mlp": []}
    outside = dict(model.named_parameters())
    for name, axes in family.outer_axes.items():
        parameter = outside.get(name)
        if parameter is not None and parameter.ndim == 2:
            hidden += of_vector(of(parameter).sum(1 - axes.index(HIDDEN)))
    for layer in layers_in_turn(model):
        parameters = dict(layer.named_parameters())
        by_unit: dict[Unit, Tensor] = {
            "query_heads": torch.zeros(source.num_attention_heads * dh, dtype=torch.float64),
            "kv_groups": torch.zeros(K * dh, dtype=torch.float64),
            "intermediate": torch.zeros(source.intermediate_size, dtype=torch.float64),
            "hidden": hidden,
        }
        for kind, sublayer in family.sublayers.items():
            total = torch.zeros((), dtype=torch.float64)
            for name, axes in sublayer.axes.items():
                if name not in parameters or parameters[name].ndim != 2:
                    continue
                values = of(parameters[name])
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
    attention, mlp = (torch.stack(sublayers[kind]) for kind in ("attention", "mlp"))
    return {
        "attention": attention,
        "mlp": mlp,
        "layers": attention + mlp,
        "kv_groups": torch.stack(groups),
        "query_heads": torch.stack(query),
        "intermediate": torch.stack(units),
        "hidden": hidden,
    }
