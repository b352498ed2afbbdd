"""The loss of a language model: next-token cross-entropy, summed over tokens.

Shapes: B sequences, T = S + 1 tokens of a row (S inputs and the last label).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from shearing.data.documents import IGNORED_LABEL, Documents, Inputs
from shearing.models.anatomy import backbone, head_weight
from shearing.objectives.cross_entropy import causal_lm_loss

PARAMETER_PREFIX = "model."
"""What precedes a model's own parameter names in its `LanguageModelLoss`, and so in an engine."""


class Losses(NamedTuple):
    """Sums of the loss of B rows, in nats.

    Attributes:
        total: over all tokens; scalar, with gradient.
        rows: [B], over the tokens of each row; without gradient.
        labels: int64 [B], how many tokens of each row count.
    """

    total: Tensor
    rows: Tensor
    labels: Tensor


class LanguageModelLoss(nn.Module):
    """A causal language model whose forward pass is its loss: what an engine prepares and the loop calls.

    Args:
        model: Hugging Face model, or one masked in place; its parameters appear under `model.`.
        chunk_tokens: tokens whose logits exist at the same time.
    """

    def __init__(self, model: PreTrainedModel, *, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self._chunk_tokens = chunk_tokens

    def forward(self, tokens_BT: Tensor, documents: Documents | None = None) -> Losses:
        """Sums of the loss over the B * (T - 1) tokens, or those that count.

        Args:
            tokens_BT: int64, S inputs and the last label: T = S + 1.
            documents: of these rows; None where documents mean nothing.
        """
        inputs = Inputs(tokens_BT[:, :-1], documents)
        hidden_BSD = backbone(self.model)(**inputs.keywords()).last_hidden_state
        labels_BS = tokens_BT[:, 1:] if documents is None else documents.labels(tokens_BT)
        total, losses_BS = causal_lm_loss(
            hidden_BSD, head_weight(self.model), labels_BS, chunk_tokens=self._chunk_tokens
        )
        return Losses(total, losses_BS.sum(1), (labels_BS != IGNORED_LABEL).sum(1))
