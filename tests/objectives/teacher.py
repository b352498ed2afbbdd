"""An objective that listens to a teacher: all that another one takes is a file like this, and its name in the list."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Self

from shearing.data.documents import Documents
from shearing.objectives.language_model import LanguageModelLoss
from shearing.objectives.objective import Losses, Objective, Parts


class TeachersLoss(Objective):
    """How far the model's loss is above its teacher's."""

    def __init__(self, model: PreTrainedModel, *, teacher: PreTrainedModel) -> None:
        super().__init__(model)
        self._own = LanguageModelLoss(model, chunk_tokens=8)
        self._teacher = (LanguageModelLoss(teacher.requires_grad_(False), chunk_tokens=8),)

    @classmethod
    def of(cls, parts: Parts) -> Self:
        """See `Objective.of`."""
        return cls(parts.model, teacher=parts.source())

    @property
    def teacher(self) -> PreTrainedModel:
        """The teacher's model."""
        return self._teacher[0].model

    def forward(self, tokens_BT: Tensor, documents: Documents | None = None) -> Losses:
        """See `Objective.forward`."""
        losses = self._own(tokens_BT, documents)
        if not self.training:
            return losses
        with torch.no_grad():
            of_teacher = self._teacher[0](tokens_BT, documents)
        return losses._replace(total=losses.total - of_teacher.total)
