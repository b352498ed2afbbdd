"""How much each unit matters before anything is learned: activations, magnitude, chance.

They warm-start the masks and serve as baselines of the same shape.

Legend: B sequences, S positions, L layers, d hidden, m intermediate, K KV groups, G query heads per group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shearing.models.cutting import Selection
from shearing.models.masked import Masks
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import as_masks, granularities_of, unit_sizes
from shearing.pruning.structured.rounding import round_to_target

Scores = dict[str, Tensor]
"""Granularity -> scores: layers, attention, mlp [L]; kv_groups [L, K]; query_heads [L, K, G]; intermediate [L, m];
hidden [d]; higher is more important."""

EVERY_GRANULARITY = ("layers", "kv_groups", "query_heads", "intermediate", "hidden")


def select(scores: Scores, *, source: Shape, target: Shape) -> tuple[Masks, Selection]:
    """The best units of every row at the target shape: binary masks and what they select."""
    granularities = granularities_of(EVERY_GRANULARITY, source=source, target=target)
    masks = as_masks(round_to_target(scores, granularities=granularities))
    return masks, Selection.of(masks, source=source, target=target)


def random_importance(source: Shape, *, seed: int) -> Scores:
    """Uniform scores."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(size, generator=generator) for name, size in unit_sizes(source).items()}
