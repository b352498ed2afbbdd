"""The loss of a model under masks while its weights are frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from shearing.data.documents import Inputs
from shearing.models.anatomy import backbone
from shearing.models.masked import MaskedModel
from shearing.processes.processes import Processes
from shearing.pruning.calibration.shares import rows_of_batch
from shearing.pruning.structured.granularities import as_masks
from shearing.pruning.structured.importance.text_loss import number_of_labels, sum_of_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MaskedLoss:
    """A masked model with frozen weights; from `frozen`."""

    def __init__(self, model: MaskedModel, *, processes: Processes) -> None:
        self._model, self._processes = model, processes

    def __call__(self, z: Mapping[str, Tensor], batch: Inputs) -> Tensor | None:
        """Mean loss of a batch in nats a token, as far as it is of this process's rows; a scalar with gradient.

        Added up over processes it is the mean loss. None where this process has no row of the batch.

        Args:
            z: mask values by granularity, on the model's device.
            batch: its text.
        """
        self._model.set_masks(as_masks(z))
        own = rows_of_batch(batch, processes=self._processes)
        if own is None:
            return None
        hidden = backbone(self._model.model)(**own.keywords()).last_hidden_state
        return sum_of_losses(self._model.model, hidden, own) / max(1, number_of_labels([batch]))


@contextmanager
def frozen(model: PreTrainedModel, *, processes: Processes | None = None) -> Iterator[MaskedLoss]:
    """The loss of a model under masks, shared by processes; the model is as it was when the context ends."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    masked = MaskedModel(model)
    try:
        yield MaskedLoss(masked, processes=processes or Processes())
    finally:
        masked.release()
        for parameter in trained:
            parameter.requires_grad_(True)
