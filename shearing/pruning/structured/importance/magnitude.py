"""Importance by the norm of the weights of each unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from shearing.models.shape import Shape
from shearing.processes.processes import Processes
from shearing.pruning.structured.importance.metric import Cost, Evidence, Scores
from shearing.pruning.structured.importance.unit_sums import unit_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Magnitude:
    """L2 norm of every weight that a unit owns; see `Metric`."""

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """All layers at once."""
        del source, evidence
        return 1

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """Next to nothing."""
        del source, evidence
        return Cost()

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `magnitude_scores`."""
        scores = magnitude_scores(model, processes=evidence.processes)
        advance(1)
        return scores


@torch.no_grad()
def magnitude_scores(model: PreTrainedModel, *, processes: Processes | None = None) -> Scores:
    """L2 norm of every weight that a unit owns; processes share the layers."""
    squares = unit_sums(model, of=lambda matrix: matrix.detach().cpu().double().square(), processes=processes)
    return {name: values.sqrt().float() for name, values in squares.items()}
