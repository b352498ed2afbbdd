"""Importance of layers by block influence: how far a layer turns the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from shearing.models.shape import Shape
from shearing.pruning.structured.importance.activations import Activations
from shearing.pruning.structured.importance.metric import Cost, Evidence, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BlockInfluence:
    """1 - mean cosine of input and output of layers and sub-layers (ShortGPT, arXiv 2403.03853), and nothing else.

    It is what `Activations` says of them: one formula, measured in the same pass. See `Metric`.
    """

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """One pass for each batch of the text."""
        return Activations().units_of_work(source, evidence=evidence)

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """One forward pass over the text."""
        return Activations().cost(source, evidence=evidence)

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `BlockInfluence`."""
        scores = Activations().scores(model, evidence=evidence, advance=advance)
        return {name: scores[name] for name in ("layers", "attention", "mlp")}
