"""The loss of a model under masks while its weights are frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from shearing.data.documents import Inputs
from shearing.models.anatomy import backbone
from shearing.models.masked import MaskedModel
from shearing.pruning.structured.granularities import as_masks
from shearing.pruning.structured.importance.text_loss import number_of_labels, sum_of_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MaskedLoss:
    """A masked model with frozen weights; from `frozen`."""

    def __init__(self, model: MaskedModel) -> None:
        self._model = model

    def __call__(self, z: Mapping[str, Tensor], batch: Inputs) -> Tensor:
        """Mean loss of a batch in nats a token, a scalar with gradient where the masks have one.

        Args:
            z: mask values by granularity, on the model's device.
            batch: its text.
        """
        self._model.set_masks(as_masks(z))
        hidden = backbone(self._model.model)(**batch.keywords()).last_hidden_state
        return sum_of_losses(self._model.model, hidden, batch) / max(1, number_of_labels([batch]))


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[MaskedLoss]:
    """The loss of a model under masks; the model is as it was when the context ends."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    masked = MaskedModel(model)
    try:
        yield MaskedLoss(masked)
    finally:
        masked.release()
        for parameter in trained:
            parameter.requires_grad_(True)
