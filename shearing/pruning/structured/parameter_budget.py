"""A parameter budget instead of a shape (the CoFi way): sizes are free, layer by layer, until made uniform.

Legend: L layers, d hidden, m intermediate, K KV groups, G query heads per group, dh head dimension, E experts.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shearing.errors import ShearingError, key
from shearing.models.families.axes import Unit, count
from shearing.models.recipe import TargetRecipe, target_contradictions
from shearing.models.shape import EXPERT_ALIGNMENT, Shape, export_error, resolve_target
from shearing.pruning.structured.granularities import SIZE_OF, Granularity

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONSTRAINT = "total_parameters"


@dataclass(frozen=True)
class ParameterBudget:
    """Number of parameters to reach, embeddings included.

    Attributes:
        parameters: the budget.
        uniform: end in one size for all layers, which an ordinary config can hold; otherwise the result is masks
            alone and cannot be exported.
        accepts: whether the exported config takes a shape.
        multiple_of: hidden and intermediate size of a uniform result are multiples of it, where they are pruned.
    """

    parameters: int
    uniform: bool
    accepts: Callable[[Shape], bool]
    multiple_of: int = 1


def shape_or_budget(target: TargetRecipe, *, source: PretrainedConfig) -> Shape | ParameterBudget:
    """What masks are to reach: the shape that sizes by name make, or a number of parameters.

    Args:
        target: sizes by name, those left out being the source's; or `parameters`.
        source: config of the source model.

    Raises:
        ShearingError: both or neither of them, or what goes with the other alone; see `resolve_target`.
    """
    for error in target_contradictions(target):
        raise error
    if target.parameters is None:
        return resolve_target(target, source=source)
    return ParameterBudget(
        parameters=target.parameters,
        uniform=target.uniform,
        multiple_of=target.multiple_of,
        accepts=lambda shape: export_error(shape, source=source, own=True) is None,
    )


def count_parameters(alive: Mapping[str, Tensor], *, source: Shape) -> Tensor:
    """Parameters left when each unit is alive with the given probability (CoFi, arXiv 2204.00408, equation 4).

    Args:
        alive: granularity -> probabilities (or a binary mask) of its `log_alpha`'s shape; absent: all alive.
        source: sizes of the source model.

    Returns:
        A scalar; exact for binary masks, differentiable for probabilities.
    """
    device = next(iter(alive.values())).device
    L, K, G, dh = (
        source.num_hidden_layers,
        source.num_key_value_heads,
        source.query_heads_per_group,
        source.head_dim,
    )

    def get(name: str, *size: int) -> Tensor:
        return alive[name] if name in alive else torch.ones(size, device=device)

    layers = get("layers", L)
    attention_L, mlp_L = alive.get("attention", layers), alive.get("mlp", layers)
    groups_LK = get("kv_groups", L, K)
    kv_L = groups_LK.sum(-1) * dh
    query_L = (groups_LK * get("query_heads", L, K, G).sum(-1)).sum(-1) * dh
    units: dict[Unit, Any] = {
        **source.units(),
        "hidden": get("hidden", source.hidden_size).sum(),
        "query_heads": query_L,
        "kv_groups": kv_L,
    }
    if source.num_experts:
        experts_LE = get("experts", L, source.num_experts)
        units_LE = get("intermediate", L, source.num_experts, source.intermediate_size).sum(-1)
        units |= {"experts": experts_LE.sum(-1), "intermediate": (experts_LE * units_LE).sum(-1)}
    else:
        units["intermediate"] = get("intermediate", L, source.intermediate_size).sum(-1)
    stacks = source.family.mlp.stacks
    of_mlp = [parameter for parameter in source.family.mlp.parameters if parameter not in stacks]
    attention, mlp = count(source.family.attention.parameters, units), count(of_mlp, units)
    # All experts' units are one number by now, as experts differ in size while masks are learned.
    mlp = mlp + count(stacks, {**units, "experts": 1})
    total: Tensor = count(source.outer_parameters(), units) + (attention_L * attention + mlp_L * mlp).sum()
    return total


def round_to_budget(
    scores: Mapping[str, Tensor], *, granularities: Sequence[Granularity], source: Shape, parameters: int
) -> dict[str, Tensor]:
    """Binary masks that keep the best-scored units of all kinds while the budget lasts; as few as allowed at least.

    Returns:
        Granularity -> mask of zeros and ones of its `log_alpha`'s shape; at most `parameters` are left, with as
        many units as fit.

    Raises:
        ShearingError: not even `Granularity.least` units a row fit.
    """
    best_of_row, values = [], []
    for granularity in granularities:
        row_scores = scores[granularity.name].detach().float().cpu()
        first = torch.zeros_like(row_scores, dtype=torch.bool)
        first.scatter_(-1, row_scores.topk(granularity.least, dim=-1).indices, True)
        best_of_row.append(first.flatten())
        values.append(row_scores.flatten())
    ranking = torch.cat(values).masked_fill(torch.cat(best_of_row), float("inf"))
    order = torch.argsort(ranking, descending=True, stable=True)

    def keep(count: int) -> dict[str, Tensor]:
        flat = torch.zeros_like(ranking)
        flat[order[:count]] = 1.0
        parts = flat.split([value.numel() for value in values])
        return {g.name: part.view(g.size) for g, part in zip(granularities, parts, strict=True)}

    low, high = int(torch.cat(best_of_row).sum()), ranking.numel()
    smallest = int(count_parameters(keep(low), source=source))
    if smallest > parameters:
        raise ShearingError(
            "parameters",
            value=parameters,
            allowed=f"{smallest} to {source.num_parameters()} with the granularities of this recipe",
            mend=f"raise {key('parameters')}, or add granularities to {key('granularities')}",
        )
    while low < high:
        middle = (low + high + 1) // 2
        if int(count_parameters(keep(middle), source=source)) <= parameters:
            low = middle
        else:
            high = middle - 1
    return keep(low)


def uniform_shape(masks: Mapping[str, Tensor], *, source: Shape, budget: ParameterBudget) -> Shape:
    """The ordinary shape nearest to per-layer sizes: means over the layers that are kept, then within the budget.

    The number of layers, KV groups, query heads and experts are rounded means, the hidden size is the nearest one that
    the config accepts, and the intermediate size takes what the budget leaves; both are multiples of what the budget
    says. Where these exceed the budget, as rounding up may where nothing else gives way, they are the whole numbers
    nearest to the means that do not (`_around`).

    Raises:
        ShearingError: no shape of these sizes fits the budget.
    """
    every_layer = torch.ones(source.num_hidden_layers)
    layers = masks.get("layers", every_layer)
    attention, mlp = masks.get("attention", layers).bool().cpu(), masks.get("mlp", layers).bool().cpu()
    groups = _with_groups(masks, attention=attention)

    def mean(name: str, of: Tensor, full: int) -> float:
        return float(masks[name].cpu()[of].sum(-1).float().mean()) if name in masks else float(full)

    width = int(masks["hidden"].sum()) if "hidden" in masks else source.hidden_size
    multiple_of = math.lcm(budget.multiple_of, EXPERT_ALIGNMENT) if source.num_experts else budget.multiple_of
    units = mean("intermediate", _with_experts(masks, mlp=mlp), source.intermediate_size)
    widths = sorted(
        range(multiple_of, source.hidden_size + 1, multiple_of) if "hidden" in masks else [source.hidden_size],
        key=lambda value: (abs(value - width), value),
    )
    means = {
        "num_hidden_layers": (int(attention.sum()) + int(mlp.sum())) / 2,
        "num_key_value_heads": mean("kv_groups", attention, source.num_key_value_heads),
        "query_heads_per_group": mean("query_heads", groups, source.query_heads_per_group),
        "num_experts": mean("experts", mlp, source.num_experts),
    }
    for near in _around(means, free=masks.keys(), source=source):
        for hidden_size in widths:
            shape = dataclasses.replace(near, hidden_size=hidden_size)
            size = source.intermediate_size
            if "intermediate" in masks:
                size = _room(shape, parameters=budget.parameters, multiple_of=multiple_of)
                # Within a factor of two of what was learned; otherwise this width is not near the learned sizes.
                fits = size > 0 and units / 2 <= size
            else:
                fits = shape.num_parameters() <= budget.parameters
            if fits and budget.accepts(shape):
                return dataclasses.replace(shape, intermediate_size=size)
    raise ShearingError(
        "parameters",
        value=budget.parameters,
        allowed="a budget that some uniform shape near the learned sizes meets",
        mend=f"raise {key('parameters')} or prune more kinds of units ({key('granularities')})"
        + (f", or lower {key('multiple_of')}" if budget.multiple_of > 1 else ""),
    )


def _with_groups(masks: Mapping[str, Tensor], *, attention: Tensor) -> Tensor:
    """Where there are query heads [L], or [L, K] where groups have masks: one that is gone has heads of no meaning."""
    return attention[:, None] & masks["kv_groups"].bool().cpu() if "kv_groups" in masks else attention


def _around(means: Mapping[str, float], *, free: Collection[str], source: Shape) -> Iterator[Shape]:
    """Shapes whose sizes are whole numbers, the nearest to the means first and so the rounded means; then all others.

    Near is a small sum of squares of what sizes differ by, each as a share of the source's; of shapes that are equally
    near the larger comes first. Nothing is listed before it is asked for.

    Args:
        means: size of a `Shape` -> its mean.
        free: granularities that have masks; what none of them prunes stays the source's.
        source: sizes of the source model, beyond which nothing grows.
    """
    full = [getattr(source, size) for size in means]
    bounds = [
        (max(1, source.num_experts_per_tok if size == "num_experts" else 1), whole)
        if any(SIZE_OF[name] == size for name in free)
        else (whole, whole)
        for size, whole in zip(means, full, strict=True)
    ]

    def entry(sizes: tuple[int, ...]) -> tuple[float, int, tuple[int, ...], Shape]:
        compared = zip(sizes, means.values(), full, strict=True)
        distance = sum(((size - mean) / max(1, whole)) ** 2 for size, mean, whole in compared)
        depth, groups, per_group, experts = sizes
        shape = dataclasses.replace(
            source,
            num_hidden_layers=depth,
            num_attention_heads=groups * per_group,
            num_key_value_heads=groups,
            num_experts=experts,
        )
        return distance, -shape.num_parameters(), sizes, shape

    rounded = tuple(min(max(low, round(mean)), high) for mean, (low, high) in zip(means.values(), bounds, strict=True))
    waiting, seen = [entry(rounded)], {rounded}
    while waiting:
        *_, sizes, shape = heapq.heappop(waiting)
        yield shape
        for place, (low, high) in enumerate(bounds):
            for size in (sizes[place] - 1, sizes[place] + 1):
                other = (*sizes[:place], size, *sizes[place + 1 :])
                if low <= size <= high and other not in seen:
                    seen.add(other)
                    heapq.heappush(waiting, entry(other))


def _room(shape: Shape, *, parameters: int, multiple_of: int) -> int:
    """The largest intermediate size that the budget leaves beside the other sizes, at most this shape's own."""
    one = dataclasses.replace(shape, intermediate_size=1).num_parameters()
    two = dataclasses.replace(shape, intermediate_size=2).num_parameters()
    room = min(1 + (parameters - one) // (two - one), shape.intermediate_size)
    return room - room % multiple_of


def _with_experts(masks: Mapping[str, Tensor], *, mlp: Tensor) -> Tensor:
    """Which rows of `intermediate` there are: those of the layers, or of the experts, that are kept."""
    if "experts" not in masks:
        return mlp
    return masks["experts"].cpu().bool() & mlp[:, None]
