"""What each unit owns of every matrix: sums over rows and columns, by the declared axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.families.axes import HIDDEN, Axes, Unit
from shearing.models.shape import Shape
from shearing.models.stored.paging.on_demand import weights_here
from shearing.processes.processes import Processes
from shearing.pruning.structured.granularities import unit_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Of = Callable[[nn.Parameter], Tensor]
"""What is summed: from a matrix of the model to as many numbers, fp64 on the CPU."""


class UnitSums:
    """Sums over the entries of all matrices that each unit owns; vectors (biases, gains) count for nobody.

    What is outside of the layers, and each layer, is added once, in any order and by any of the processes.

    Args:
        model: of any family.
        of_vector: what a row or column of a matrix counts for, from the sum over its entries, entry by entry. A
            sub-layer's sum is over the rows and columns of its units.
    """

    def __init__(self, model: PreTrainedModel, *, of_vector: Callable[[Tensor], Tensor] = lambda sums: sums) -> None:
        self._model, self._of_vector = model, of_vector
        self._family = anatomy_of(model)
        self._source = Shape.of(model.config)
        self._outer: dict[str, Tensor] = {}
        self._layers: dict[int, dict[str, Tensor]] = {}

    def add_outer(self, parameter: nn.Parameter, of: Of) -> None:
        """Add a matrix outside of the layers."""
        for name, other in self._model.named_parameters():
            if other is parameter and name in self._family.outer_axes and parameter.ndim == 2:
                self._outer[name] = self._of_vector(of(parameter).sum(1 - self._family.outer_axes[name].index(HIDDEN)))

    def add_layer(self, index: int, of: Of) -> None:
        """Add the matrices of a layer."""
        source = self._source
        K, G, dh = source.num_key_value_heads, source.query_heads_per_group, source.head_dim
        parameters = dict(decoder_layers(self._model)[index].named_parameters())
        hidden: list[Tensor] = []
        by_unit: dict[Unit, Tensor] = {
            "query_heads": torch.zeros(source.num_attention_heads * dh, dtype=torch.float64),
            "kv_groups": torch.zeros(K * dh, dtype=torch.float64),
            "intermediate": torch.zeros(unit_sizes(source)["intermediate"][1:], dtype=torch.float64),
            "experts": torch.zeros(source.num_experts, dtype=torch.float64),
        }
        found: dict[str, Tensor] = {}
        for kind, sublayer in self._family.sublayers.items():
            total = torch.zeros((), dtype=torch.float64)
            for name, axes in sublayer.axes.items():
                if name not in parameters or parameters[name].ndim < 2:
                    continue
                values = of(parameters[name])
                if values.ndim > 2:
                    total += _add_stack(by_unit, hidden, values, axes, of_vector=self._of_vector, source=source)
                    continue
                for position, axis in enumerate(axes):
                    of_axis = self._of_vector(values.sum(1 - position))
                    for unit, where in axis.places(source.units()):
                        if unit == "hidden":
                            hidden.append(of_axis[where])
                        else:
                            by_unit[unit] += of_axis[where]
                    if axis != HIDDEN:
                        total += of_axis.sum()
            found[kind] = total
        heads = by_unit["query_heads"].view(K, G, dh).sum(-1)
        found["query_heads"] = heads
        found["kv_groups"] = heads.sum(-1) + by_unit["kv_groups"].view(K, dh).sum(-1)
        found["intermediate"] = by_unit["intermediate"]
        found["experts"] = by_unit["experts"]
        found["hidden"] = torch.stack(hidden)  # each by itself: sums do not depend on who has added what
        self._layers[index] = found

    def sums(self, processes: Processes | None = None) -> dict[str, Tensor]:
        """By granularity, as `Scores` but fp64; of what all processes have added together."""
        outer, layers = self._outer, self._layers
        if processes is not None and processes.size > 1:
            for of_outer, of_layers in processes.gather((self._outer, self._layers)):
                outer, layers = {**outer, **of_outer}, {**layers, **of_layers}
        hidden = torch.zeros(self._source.hidden_size, dtype=torch.float64)
        for name in self._family.outer_axes:
            if name in outer:
                hidden += outer[name]
        ordered = [layers[index] for index in sorted(layers)]
        for of_layer in ordered:
            for part in of_layer["hidden"]:
                hidden += part
        stacked = {
            name: torch.stack([of_layer[name] for of_layer in ordered])
            for name in (
                "attention",
                "mlp",
                "kv_groups",
                "query_heads",
                "intermediate",
                *(["experts"] if self._source.num_experts else []),
            )
        }
        return {**stacked, "layers": stacked["attention"] + stacked["mlp"], "hidden": hidden}


def unit_sums(model: PreTrainedModel, *, of: Of, processes: Processes | None = None) -> dict[str, Tensor]:
    """All that `UnitSums` sums up, where it can be told of any matrix by itself; processes share the layers."""
    processes = processes or Processes()
    found = UnitSums(model)
    if processes.is_main:
        for parameter in outer_matrices(model):
            with weights_here(parameter):
                found.add_outer(parameter, of)
    for index, layer in enumerate(decoder_layers(model)):
        if index % processes.size == processes.rank:
            with weights_here(layer):
                found.add_layer(index, of)
    return found.sums(processes)


def outer_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """Embedding and head; one where they are tied."""
    named = dict(model.named_parameters())
    return [named[name] for name in anatomy_of(model).outer_axes if name in named and named[name].ndim == 2]


def _add_stack(
    by_unit: dict[Unit, Tensor],
    hidden: list[Tensor],
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
            if unit == "hidden":
                hidden.append(of_axis[:, where].sum(0))
            else:
                by_unit[unit] += of_axis[:, where]
        if axis != HIDDEN:
            by_unit["experts"] += of_axis.sum(1)
            total += of_axis.sum()
    return total
