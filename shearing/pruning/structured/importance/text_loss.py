"""The language loss on calibration text, which has no label for the last token of a row.

Shapes: B sequences of S tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from shearing.data.documents import IGNORED_LABEL, Inputs
from shearing.errors import ShearingError, key
from shearing.models.anatomy import head_of
from shearing.models.stored.paging.on_demand import weights_here
from shearing.objectives.cross_entropy import causal_lm_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_TOKENS = 1024


def labels_of(batch: Inputs) -> Tensor:
    """The token that each position but the last of its row has to predict, [B, S - 1]; -100 where it does not count."""
    labels_BS = batch.tokens[:, 1:]
    left_out = None if batch.documents is None else batch.documents.left_out
    return labels_BS if left_out is None else labels_BS.masked_fill(left_out[:, :-1], IGNORED_LABEL)


def number_of_labels(text: Sequence[Inputs]) -> int:
    """How many tokens of a text count."""
    return sum(int((labels_of(batch) != IGNORED_LABEL).sum()) for batch in text)


def require_labels(count: int) -> int:
    """The number of labels, if there are any.

    Raises:
        ShearingError: there are none.
    """
    if not count:
        raise ShearingError(
            "calibration_tokens",
            value="no label that counts",
            allowed="calibration text in which a token follows another of its document",
            mend=f"read more of it: raise {key('calibration_tokens')}",
        )
    return count


def sum_of_losses(model: PreTrainedModel, hidden_BSD: Tensor, batch: Inputs) -> Tensor:
    """Cross-entropy summed over the labels of a batch, in nats: a scalar with gradient.

    Args:
        model: whose head it is, masked or not.
        hidden_BSD: hidden states of the batch after the final norm.
        batch: what was read.
    """
    head = head_of(model)
    with weights_here(head.weight):
        total, _ = causal_lm_loss(hidden_BSD[:, :-1], head, labels_of(batch), chunk_tokens=_CHUNK_TOKENS)
    return total


def finite(loss: float, *, metric: str) -> float:
    """The loss, if it is a number.

    Args:
        loss: that scores would be made of.
        metric: as users call it.

    Raises:
        ShearingError: it is not finite.
    """
    if not math.isfinite(loss):
        raise ShearingError(
            f"{key('initial_masks')} ({metric})",
            value=loss,
            allowed="losses on the calibration text that are finite numbers",
            mend="choose another metric; if its losses are not finite either, mend the source model",
        )
    return loss
