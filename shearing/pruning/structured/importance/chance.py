"""Importance by chance: what every metric has to be better than."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import unit_sizes
from shearing.pruning.structured.importance.metric import Cost, Evidence, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Chance:
    """Uniform scores, by the seed alone; see `Metric`."""

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """One draw."""
        del source, evidence
        return 1

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """Next to nothing."""
        del source, evidence
        return Cost()

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `random_scores`."""
        scores = random_scores(Shape.of(model.config), seed=evidence.seed)
        advance(1)
        return scores


def random_scores(source: Shape, *, seed: int) -> Scores:
    """Uniform scores in [0, 1) of the units of a model of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(size, generator=generator) for name, size in unit_sizes(source).items()}
