"""Experts cut: those that stay, each with the units that stay of it.

Legend: L layers, E experts, m units of an expert, d hidden; primes mark the target's sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from shearing.models.families.axes import Axes, Unit


def select_experts(
    alive: Mapping[str, Tensor],
    *,
    layer: int,
    sizes: tuple[int, int],
    keep: tuple[int, int],
    indices: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """Experts of a layer that stay, int64 [E'], and the units that stay of each, int64 [E', m']; ascending.

    Args:
        alive: of masks that are set, bool: `experts` [L, E] and `intermediate` [L, E, m].
        layer: whose MLP it is.
        sizes: E and m.
        keep: E' and m'.
        indices: of the entries of a row that are alive, `keep` of them; takes the row, `keep` and `name`.
    """
    experts = alive["experts"][layer] if "experts" in alive else torch.ones(sizes[0], dtype=torch.bool)
    units = alive["intermediate"][layer] if "intermediate" in alive else torch.ones(sizes, dtype=torch.bool)
    kept = indices(experts, keep[0], name=f"experts, layer {layer}")
    of_each = [
        indices(units[expert], keep[1], name=f"intermediate units, layer {layer}, expert {expert}")
        for expert in kept.tolist()
    ]
    return kept, torch.stack(of_each)


def cut_stack(stack: Tensor, axes: Axes, units: Mapping[Unit, Tensor], *, sizes: Mapping[Unit, int]) -> Tensor:
    """The kept part of a stack of all experts' matrices.

    Args:
        stack: [E, O, I].
        axes: what lies on its axes; the first is that of experts.
        units: unit -> which of its entries stay; `intermediate` [E', m'] has those of each expert that stays.
        sizes: unit -> number of its entries.
    """
    of_each = []
    for expert, of_expert in zip(units["experts"].tolist(), units["intermediate"], strict=True):
        matrix = stack[expert]
        for position, axis in enumerate(axes[1:]):
            kept = axis.kept({**units, "intermediate": of_expert}, sizes=sizes)
            if kept is not None:
                matrix = matrix.index_select(position, kept.to(matrix.device))
        of_each.append(matrix)
    return torch.stack(of_each)


def columns_of_stack(
    experts: Tensor | None, intermediate: Tensor | None, *, layer: int, kept: Tensor, units: Tensor
) -> Tensor | None:
    """What scales the columns of the stack that writes: [E', 1, m'] or [E', 1, 1]; None: nothing does.

    Args:
        experts: mask [L, E].
        intermediate: mask [L, E, m].
        layer: whose MLP it is.
        kept: [E'].
        units: [E', m'].
    """
    columns = None
    if intermediate is not None:
        of_layer = intermediate[layer].detach()
        columns = of_layer[kept.to(of_layer.device)].gather(1, units.to(of_layer.device))[:, None, :]
    if experts is None:
        return columns
    of_experts = experts[layer].detach()
    whole = of_experts[kept.to(of_experts.device)][:, None, None]
    return whole if columns is None else columns.double() * whole
