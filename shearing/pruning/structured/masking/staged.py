"""Pruning and training in turns: Adapt-Pruner (arXiv 2502.03460) with one size for all layers.

Legend: T stages; P0 and P* parameters of the source and of the target; S steps of prune; M steps of a measurement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shearing.models.masked import MaskedModel
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import SIZE_OF
from shearing.pruning.structured.masking.removal import Removal
from shearing.pruning.structured.recipe import PruneRecipe, stage_ends


class StagedRemoval(Removal):
    """Stage t begins with a removal that leaves P0 - (P0 - P*) t / T parameters, and trains a share 2 t / (T (T + 1)).

    As published: the plan of sizes, the growing shares, the first-order saliency of LLM-Pruner (arXiv 2305.11627), one
    learning-rate schedule over all. Ours: every layer has the same size, so a stage's sizes lie in even parts between
    the source's and the target's; saliency is |p| of a training step (there the sum of |w g| over a unit's weights, of
    calibration text), summed over the M steps before a removal; layers go by it too (there their -cos of input and
    output sets how much each of them loses); moments are kept. The first M steps train the source.

    Args:
        model, granularities, target, device: see `Removal`.
        settings: the section of the recipe.
        tokens_per_step: of a global batch.
    """

    def __init__(
        self,
        model: MaskedModel,
        granularities: Sequence[str],
        *,
        target: Shape,
        settings: PruneRecipe,
        tokens_per_step: int,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(model, granularities, target=target, device=device)
        self._ends, self._window = stage_ends(settings, tokens_per_step=tokens_per_step)
        self.shapes = stage_shapes(self.source, target, stages=len(self._ends))

    def removes(self, step: int) -> bool:
        """See `Removal.removes`."""
        return step + 1 in self._ends

    def measures(self, step: int) -> bool:
        """See `Removal.measures`."""
        return any(end - self._window <= step < end for end in self._ends)

    def saliency(self, product: Tensor) -> Tensor:
        """|p|."""
        return product.abs()

    def taken(self, step: int, *, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Removal.taken`: as planned."""
        del losses
        shape = self.shapes[self._ends.index(step + 1)]
        return {
            g.name: self._alive[g.name].reshape(-1, g.units)[0].sum() - getattr(shape, SIZE_OF[g.name])
            for g in self.granularities
        }


def stage_shapes(source: Shape, target: Shape, *, stages: int) -> list[Shape]:
    """Shape that each stage trains: the largest on an even way from source to target that is within its plan.

    The way has as many points as the size that shrinks most; a size has lost its share, rounded down.
    """
    names = sorted(set(SIZE_OF.values()))
    points = max(getattr(source, name) - getattr(target, name) for name in names)
    full, final = source.num_parameters(), target.num_parameters()

    def at(point: int) -> Shape:
        left = {
            name: (before := getattr(source, name)) - (before - getattr(target, name)) * point // points
            for name in names
        }
        per_group = left.pop("query_heads_per_group")
        return dataclasses.replace(source, **left, num_attention_heads=left["num_key_value_heads"] * per_group)

    shapes = []
    for stage in range(1, stages + 1):
        low, high = 0, points
        while low < high:
            middle = (low + high) // 2
            if at(middle).num_parameters() * stages <= full * stages - (full - final) * stage:
                high = middle
            else:
                low = middle + 1
        shapes.append(at(low))
    return shapes
