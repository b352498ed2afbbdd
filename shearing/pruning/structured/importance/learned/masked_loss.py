"""The loss of a model under masks while its weights are frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from shearing.data.documents import Inputs
from shearing.models.anatomy import backbone
from shearing.models.masked import MaskedModel
from shearing.pruning.calibration.shares import shares_of
from shearing.pruning.structured.granularities import as_masks
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.text_loss import number_of_labels, sum_of_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MaskedLoss:
    """A masked model with frozen weights; from `frozen`."""

    def __init__(self, model: MaskedModel) -> None:
        self._model = model

    def __call__(self, z: Mapping[str, Tensor], piece: Inputs) -> Tensor:
        """Loss summed over the labels of some rows, in nats; a scalar with gradient.

        Args:
            z: mask values by granularity, on the model's device.
            piece: the rows, which pass through the model together.
        """
        self._model.set_masks(as_masks(z))
        hidden = backbone(self._model.model)(**piece.keywords()).last_hidden_state
        return sum_of_losses(self._model.model, hidden, piece)


@dataclass(frozen=True)
class Step:
    """Text on which masks are tried together.

    Attributes:
        own: what this process reads of it, in pieces that pass through the model one after the other; may be none.
        labels: how many count in what all processes read of it; 1 where none does.
    """

    own: list[Inputs]
    labels: int


def steps_for(evidence: Evidence) -> list[Step]:
    """Those of the text, the rows of each shared out among the processes."""
    return [
        Step([share.inputs for share in shares_of(step, processes=evidence.processes)], max(1, number_of_labels(step)))
        for step in evidence.steps
    ]


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
