"""What a step minimises, as Composer's trainer calls it.

Shapes: B sequences of a micro-batch, T = S + 1 tokens of a row (S inputs and the last label).
"""

from __future__ import annotations

from collections.abc import Mapping

from composer.models import ComposerModel
from torch import Tensor

from shearing.objectives import Losses, Objective


class ObjectiveModel(ComposerModel):
    """An objective, `LanguageModelLoss` or another, under Composer's trainer.

    The logits of a batch never exist at once, which is what it has over Composer's own `HuggingFaceModel`; that one
    takes the same batches. Every token of them counts, whatever their `labels` say.

    Args:
        objective: with its Hugging Face model.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Mapping[str, Tensor]) -> Losses:
        """Sums over the rows of a batch, whose `input_ids` are tokens [B, T]."""
        losses: Losses = self.objective(batch["input_ids"])
        return losses

    def loss(self, outputs: Losses, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean over tokens, which Composer weighs by the rows of the micro-batch."""
        del batch
        return outputs.total / outputs.labels.sum()
