"""Importance by the norm of the weights of each unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.families.axes import HIDDEN, Unit
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.metric import Evidence, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Magnitude:
    """L2 norm of every weight that a unit owns; see `Metric`."""

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """All layers at once."""
        del source, evidence
        return 1

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `magnitude_scores`."""
        del evidence
        scores = magnitude_scores(model)
        advance(1)
        return scores


@torch.no_grad()
def magnitude_scores(model: PreTrainedModel) -> Scores:
    """L2 norm of every weight that a unit owns."""
    family = anatomy_of(model)
    source = Shape.of(model.config)
    K, G, dh = source.num_key_value_heads, source.query_heads_per_group, source.head_dim
    hidden = torch.zeros(source.hidden_size, dtype=torch.float64)
    query, groups, units = [], [], []
    sublayers: dict[str, list[Tensor]] = {"attention": [], "mlp": []}
    for name, axes in family.outer_axes.items():
        parameter = dict(model.named_parameters()).get(name)
        if parameter is not None and parameter.ndim == 2:
            hidden += _squares(parameter, axes.index(HIDDEN))
    for layer in decoder_layers(model):
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
                for position, axis in enumerate(axes):
                    squares_of_axis = _squares(parameters[name], position)
                    for unit, where in axis.places(source.units()):
                        by_unit[unit] += squares_of_axis[where]
                total += parameters[name].detach().cpu().double().square().sum()
            sublayers[kind].append(total)
        heads = by_unit["query_heads"].view(K, G, dh).sum(-1)
        query.append(heads)
        groups.append(heads.sum(-1) + by_unit["kv_groups"].view(K, dh).sum(-1))
        units.append(by_unit["intermediate"])
    squares = {
        "attention": torch.stack(sublayers["attention"]),
        "mlp": torch.stack(sublayers["mlp"]),
        "layers": torch.stack(sublayers["attention"]) + torch.stack(sublayers["mlp"]),
        "kv_groups": torch.stack(groups),
        "query_heads": torch.stack(query),
        "intermediate": torch.stack(units),
        "hidden": hidden,
    }
    return {name: values.sqrt().float() for name, values in squares.items()}


def _squares(parameter: Tensor, axis: int) -> Tensor:
    return parameter.detach().cpu().double().square().sum(1 - axis)
