"""Several sizes trained at once: each is a part of the next larger one, and all share their weights.

Units are sorted by importance and a size keeps the first ones of every row, so that the sizes are nested (MatFormer,
arXiv 2310.07707; Flextron, arXiv 2406.10260; Nemotron Elastic, arXiv 2511.16664, whose router is left out: sizes are
given). A step, or a part of one, trains one of them, under binary masks; gradients of what that size does not have are
0. Nothing is learned of the masks.

Legend: w_s weights of the sizes, summing to 1; n draws that the run has made.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.pruning.structured.masking.recipe import WHOLE
from shearing.pruning.structured.rounding import select

BLOCK = 64
"""Draws in which every size has its share of turns."""


def nested_masks(
    scores: Mapping[str, Tensor], *, source: Shape, shapes: Mapping[str, Shape]
) -> dict[str, dict[str, Tensor]]:
    """Binary masks of each size: the best units of every row, by the same scores for all sizes.

    Where shapes shrink from each to the next, so do the sets of units: the best k of a row are among the best k + 1.

    Args:
        scores: of all granularities in which a shape is smaller, see `Scores`.
        source: shape of the model that they are of.
        shapes: of the sizes, by name.

    Returns:
        For each size the fields of its `Masks`.
    """
    return {name: select(scores, source=source, target=shape)[0].tensors() for name, shape in shapes.items()}


@lru_cache(maxsize=4)
def _dealt(block: int, *, weights: tuple[float, ...], seed: int) -> tuple[int, ...]:
    """Sizes of the draws of a block, by index."""
    # Python promises the same numbers for a seed in every version; of its shuffles it does not.
    numbers = random.Random(f"{seed} sizes {block}")  # noqa: S311
    start = numbers.random()
    total, bounds = sum(weights), list(accumulate(weights))
    places = [(place + start) / BLOCK * total for place in range(BLOCK)]
    dealt = [min(bisect_right(bounds, place), len(weights) - 1) for place in places]
    order = sorted(range(BLOCK), key=[numbers.random() for _ in range(BLOCK)].__getitem__)
    return tuple(dealt[place] for place in order)


def size_of_draw(draw: int, *, weights: Sequence[float], seed: int) -> int:
    """Which size a draw trains, by index: a function of the seed and the draw's number alone.

    Sizes are dealt, not thrown: in each `BLOCK` draws size s has BLOCK w_s turns, to less than one, by systematic
    sampling; their order is by chance, so that no size meets the same domains again and again.

    Args:
        draw: number of the draw from the beginning of the stage.
        weights: of the sizes, positive.
        seed: of the run.
    """
    return _dealt(draw // BLOCK, weights=tuple(weights), seed=seed)[draw % BLOCK]


class NestedMasking:
    """Drives training of nested sizes; see `MaskedTraining` for the order of the calls.

    Attributes:
        model: where the masks act.
        draws: equal shares of a step's global batch that train one size each.
        sizes: names, the largest first.

    Args:
        model: where the masks act.
        masks: of each size but the largest, see `nested_masks`; the largest is the model without masks.
        shapes: of the same sizes.
        weights: how often each size is trained, the largest as `WHOLE`; they need not sum to 1.
        draws: equal shares of a step's global batch that train one size each.
        seed: of the draws.
        device: where masks live.
    """

    def __init__(
        self,
        model: MaskedModel,
        masks: Mapping[str, Mapping[str, Tensor]],
        *,
        shapes: Mapping[str, Shape],
        weights: Mapping[str, float],
        draws: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.draws = model, draws
        self._device, self._seed = torch.device(device), seed
        self.sizes = (WHOLE, *masks)
        self._weights = tuple(weights[name] for name in self.sizes)
        self._masks: dict[str, dict[str, Tensor]] = {}
        self._take(masks)
        sizes = {WHOLE: Shape.of(model.model.config), **shapes}
        self._parameters = {name: sizes[name].num_parameters() for name in self.sizes}

    def _take(self, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._masks = {
            name: {unit: mask.to(self._device) for unit, mask in of_size.items()} for name, of_size in masks.items()
        }

    def masks_of(self, name: str) -> Masks | None:
        """The masks of a size, None of the largest."""
        return None if name == WHOLE else Masks(**self._masks[name])

    def size_at(self, *, step: int, draw: int) -> str:
        """Which size a share of a step's batch trains.

        Args:
            step: optimiser steps done.
            draw: number of the share, from 0.
        """
        number = step * self.draws + draw
        return self.sizes[size_of_draw(number, weights=self._weights, seed=self._seed)]

    def draw(self, *, step: int, sequence: int = 0, of: int = 1) -> None:
        """See `MaskedTraining.draw`; a micro-batch must lie inside one of the shares. Default: the batch in one."""
        self.model.set_masks(self.masks_of(self.size_at(step=step, draw=sequence * self.draws // of)))

    def after_backward(self, *, step: int, scale: float = 1.0) -> None:
        """See `MaskedTraining.after_backward`: these masks have no gradients."""

    def update(self, *, step: int, skip: Tensor) -> Tensor:
        """See `MaskedTraining.update`: these masks stay as they are."""
        del step
        return skip

    def settle(self, *, step: int) -> None:
        """See `MaskedTraining.settle`: the largest size."""
        del step
        self.model.set_masks(None)

    def settled_parameters(self, *, step: int) -> int:
        """See `MaskedTraining.settled_parameters`."""
        del step
        return self._parameters[WHOLE]

    def expected_parameters(self, *, step: int) -> float:
        """See `MaskedTraining.expected_parameters`: of a size that is drawn."""
        del step
        named = zip(self.sizes, self._weights, strict=True)
        return sum(weight * self._parameters[name] for name, weight in named) / sum(self._weights)

    def metrics(self, *, step: int) -> dict[str, Tensor]:
        """See `MaskedTraining.metrics`: the share of the step's batch that each size had."""
        drawn = [self.size_at(step=step, draw=draw) for draw in range(self.draws)]
        return {
            f"size/{name}": torch.full((), drawn.count(name) / self.draws, device=self._device) for name in self.sizes
        }

    def state_dict(self) -> dict[str, Any]:
        """The masks; which size comes next follows from the step."""
        return {"masks": self._masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit."""
        self._take(state["masks"])
