"""From scores to exactly the target shape: the best units of every row, and layers that an ordinary config can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shearing.models.cutting import Selection
from shearing.models.masked import Masks
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import Granularity, as_masks, granularities_of

EVERY_GRANULARITY = ("layers", "kv_groups", "query_heads", "intermediate", "hidden")


def every_granularity(source: Shape) -> tuple[str, ...]:
    """All that can go of a model: of one that has experts, those too."""
    return (*EVERY_GRANULARITY, "experts") if source.num_experts else EVERY_GRANULARITY


def select(scores: Mapping[str, Tensor], *, source: Shape, target: Shape) -> tuple[Masks, Selection]:
    """The best units of every row at the target shape: binary masks and what they select."""
    granularities = granularities_of(every_granularity(source), source=source, target=target)
    masks = as_masks(round_to_target(scores, granularities=granularities))
    return masks, Selection.of(masks, source=source, target=target)


def select_across_layers(scores: Mapping[str, Tensor], *, source: Shape, target: Shape) -> Masks:
    """The best heads and intermediate units of all layers in one ranking: sizes by layer, as many parameters.

    What FLAP (arXiv 2312.11983, AL-AM) does with the heads and units of the layers that stay. Layers, hidden
    dimensions and experts go as in `select`; of heads and units, whichever the target shrinks, those of the highest
    scores stay as long as their parameters fit into those that the target has for them. The best unit of every row
    always stays. Where KV groups go, groups are ranked, and their query heads go as in `select`.

    Args:
        scores: comparable across layers, and between heads and units; see `MetricFacts.across_layers`.
        source, target: the sizes; the target's number of parameters is reached to less than one intermediate unit, or
            one head where no units go, and never exceeded but by the units that always stay.

    Returns:
        Binary masks with rows of unequal size: for a `MaskedModel`, as no ordinary config holds them.
    """
    granularities = granularities_of(every_granularity(source), source=source, target=target)
    z = round_to_target(scores, granularities=granularities)
    layers = z.get("layers", torch.ones(source.num_hidden_layers))
    ranked = [name for name in ("kv_groups", "query_heads", "intermediate") if name in z]
    ranked = [name for name in ranked if not (name == "query_heads" and "kv_groups" in ranked)]
    costs = _parameters_of_units(target)
    budget, values, places = 0, [], []
    for name in ranked:
        of_layers = layers.view(-1, *[1] * (z[name].ndim - 1)).expand_as(z[name]) > 0
        if name == "intermediate" and "experts" in z:
            of_layers = of_layers & (z["experts"] > 0)[..., None]
        budget += costs[name] * int(z[name][of_layers].sum())
        best = (top_k(scores[name], keep=1) > 0) & of_layers
        budget -= costs[name] * int(best.sum())
        z[name] = best.float()
        others = (of_layers & ~best).nonzero()
        values.append(scores[name][tuple(others.T)].double())
        places += [(name, tuple(place)) for place in others.tolist()]
    for index in torch.cat(values).argsort(descending=True, stable=True).tolist() if values else ():
        name, place = places[index]
        if costs[name] <= budget:
            z[name][place] = 1.0
            budget -= costs[name]
    return as_masks(z)


def _parameters_of_units(shape: Shape) -> dict[str, int]:
    """Parameters that one more unit adds to a layer of this shape."""
    attention, mlp = shape.layer_parameters()
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    more: dict[str, dict[str, Any]] = {
        "kv_groups": {"num_key_value_heads": groups + 1, "num_attention_heads": heads + heads // groups},
        "query_heads": {"num_attention_heads": heads + 1},
        "intermediate": {"intermediate_size": shape.intermediate_size + 1},
    }
    found = {
        name: sum(dataclasses.replace(shape, **sizes).layer_parameters()) - attention - mlp
        for name, sizes in more.items()
    }
    return {**found, "intermediate": found["intermediate"] // max(1, shape.num_experts)}


def round_to_target(scores: Mapping[str, Tensor], *, granularities: Sequence[Granularity]) -> dict[str, Tensor]:
    """Binary masks with exactly the target's number of units in each row.

    Args:
        scores: granularity -> scores of the shape of its `log_alpha`, higher is kept.
        granularities: what to round; each has a target.

    Returns:
        Granularity -> mask of zeros and ones, fp32. Equal scores go to the unit with the lower index.
    """
    masks = {}
    for granularity in granularities:
        assert granularity.target is not None
        masks[granularity.name] = top_k(scores[granularity.name], keep=granularity.target)
    if "attention" in masks and "mlp" in masks:
        target = next(g.target for g in granularities if g.name == "attention")
        assert target is not None
        attention, mlp = alternating(scores["attention"], scores["mlp"], keep=target)
        masks["attention"], masks["mlp"] = attention, mlp
    return masks


def top_k(scores: Tensor, *, keep: int) -> Tensor:
    """Mask of the `keep` highest of each row (last axis); ties to the lower index."""
    order = torch.argsort(scores.detach().float(), dim=-1, descending=True, stable=True)[..., :keep]
    return torch.zeros(scores.shape, dtype=torch.float32, device=scores.device).scatter_(-1, order, 1.0)


def ranks(scores: Tensor) -> Tensor:
    """Rank of each unit in its row from 0, the best, in double precision; ties to the lower index."""
    order = torch.argsort(scores.float(), dim=-1, descending=True, stable=True)
    return torch.argsort(order, dim=-1).double()


def alternating(attention: Tensor, mlp: Tensor, *, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` attention and `keep` MLP sub-layers of highest total score that alternate in depth.

    An ordinary layer is an attention followed by an MLP. So the sub-layers that are kept, read from the bottom up,
    have to alternate; they may come from different layers. Dynamic programme over the 2 L sub-layers.

    Args:
        attention, mlp: [L] scores.
        keep: number of each to keep.

    Returns:
        Two masks [L] of zeros and ones.
    """
    # All of it on the device, as masks may be rounded in every step: nothing waits for a value.
    values = torch.stack([attention, mlp], dim=1).flatten().double()
    counts = torch.arange(2 * keep + 1, device=values.device)
    never = values.new_full((1,), float("-inf"))
    best = torch.where(counts == 0, values.new_zeros(()), never)
    taken = []
    for position, value in enumerate(values):
        # The count-th sub-layer kept is an attention when count is odd; positions alternate the same way.
        after = torch.cat([never, best[:-1] + value])
        took = ((counts + 1 - position) % 2 == 0) & (after > best)
        taken.append(took)
        best = torch.where(took, after, best)
    count = counts[-1:]
    kept = []
    for took in reversed(taken):
        kept.append(took.gather(0, count))
        count = count - kept[-1].long()
    pairs = torch.cat(kept[::-1]).view(-1, 2).to(torch.float32)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def changed_units(kept: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, int]:
    """Units that one choice keeps and the one before would not, by granularity; so a swap of two counts once.

    Each row is compared with the same row; rows count that the later choice keeps, as what goes with its layer or its
    group was not chosen.

    Args:
        kept: binary masks by granularity.
        start: likewise, of the choice before.
    """
    masks, changed = as_masks(kept), {}
    for name, mask in kept.items():
        gained = (mask > 0) & (start[name].to(mask.device) == 0)
        of_mlp = {"intermediate": masks.mlp, "experts": masks.mlp}
        layers = {"kv_groups": masks.attention, "query_heads": masks.attention, **of_mlp}.get(name)
        if layers is not None:
            gained &= (layers > 0).view(-1, *[1] * (gained.ndim - 1))
        if name == "query_heads" and masks.kv_groups is not None:
            gained &= (masks.kv_groups > 0)[..., None]
        if name == "intermediate" and masks.experts is not None:
            gained &= (masks.experts > 0)[..., None]
        changed[name] = int(gained.sum())
    return changed


def shape_of(masks: Masks, *, source: Shape) -> Shape:
    """Shape that binary masks leave of `source`, read from the first layer that is kept.

    Whether all layers have that shape is for `Selection.of` to check.
    """

    def kept(mask: Tensor | None, full: int) -> int:
        return full if mask is None else int((mask != 0).sum())

    def first(mask: Tensor | None) -> int:
        return 0 if mask is None else int((mask != 0).nonzero()[0])

    attention, mlp = first(masks.attention), first(masks.mlp)
    alive_groups = None if masks.kv_groups is None else masks.kv_groups[attention] != 0
    groups = kept(alive_groups, source.num_key_value_heads)
    first_group = first(alive_groups)
    heads = None if masks.query_heads is None else masks.query_heads[attention][first_group]
    experts = None if masks.experts is None else masks.experts[mlp]
    units = None if masks.intermediate is None else masks.intermediate[mlp]
    if units is not None and source.num_experts:
        units = units[first(experts)]
    return dataclasses.replace(
        source,
        num_hidden_layers=kept(masks.attention, source.num_hidden_layers),
        hidden_size=kept(masks.hidden, source.hidden_size),
        intermediate_size=kept(units, source.intermediate_size),
        num_experts=kept(experts, source.num_experts),
        num_attention_heads=groups * kept(heads, source.query_heads_per_group),
        num_key_value_heads=groups,
    )
