"""How far a model's next-token distributions are from another's, on text that both read.

Shapes: B rows, T = S + 1 tokens (S inputs, S labels), N = B * S, d hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shearing.data.documents import IGNORED_LABEL, Documents, Inputs
from shearing.models.anatomy import backbone, head_of
from shearing.models.attention import attention_within_documents

Rows = Sequence[tuple[Tensor, Documents | None]]
"""Tokens [B, T] with their documents, both on the model's device."""


@dataclass(frozen=True)
class Agreement:
    """Of a model with another.

    Attributes:
        greedy: share of positions at which both find the same token likeliest.
        kl: mean of KL(other || model), nats per token.
        tokens: number of positions.
    """

    greedy: float
    kl: float
    tokens: int


class Read:
    """What is kept of a model that has read some text: its last hidden states [N, d] and its head, on the host.

    Distributions are made from them a chunk at a time, so two models are compared without both being on the device.

    Args:
        model: a causal language model; put into eval mode and back.
        rows: the text.
        precision: dtype of autocast in the backbone; None or float32: the dtype of the parameters.
        within_documents: whether attention stays inside documents.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Rows,
        *,
        precision: torch.dtype | None = None,
        within_documents: bool = False,
    ) -> None:
        was_training, device = model.training, model.device
        model.train(False)
        try:
            with (
                torch.no_grad(),
                torch.autocast(device.type, dtype=precision, enabled=precision not in (None, torch.float32)),
                attention_within_documents(model, on=within_documents),
            ):
                read = backbone(model)
                states = [
                    read(**Inputs(tokens_BT[:, :-1], each).keywords()).last_hidden_state for tokens_BT, each in rows
                ]
        finally:
            model.train(was_training)
        self.hidden_Nd = torch.cat([state.flatten(0, 1) for state in states]).cpu()
        head = head_of(model)
        self.head = head.with_weight(head.weight.detach().cpu())
        self.counts_N = torch.cat([_counts(tokens_BT, each).flatten() for tokens_BT, each in rows]).cpu()

    def log_probabilities(self, *, chunk_tokens: int, device: torch.device) -> Iterator[Tensor]:
        """fp32 log-probabilities [C, V] of the positions that count, in order."""
        head = self.head.with_weight(self.head.weight.to(device, torch.float32))
        for hidden_Cd in self.hidden_Nd[self.counts_N].split(chunk_tokens):
            yield head.logits(hidden_Cd.to(device, torch.float32)).log_softmax(-1)


@torch.inference_mode()
def agreement(model: Read, other: Read, *, chunk_tokens: int = 256, device: torch.device | None = None) -> Agreement:
    """Compare what two models say next, at every position of the same text.

    Args:
        model, other: of the same vocabulary and the same text.
        chunk_tokens: C.
        device: where distributions are made; the host if None.

    Raises:
        ValueError: vocabularies of different sizes.
    """
    if len(model.head.weight) != len(other.head.weight):
        raise ValueError(f"vocabularies of {len(model.head.weight)} and {len(other.head.weight)} tokens")
    device = device or torch.device("cpu")
    equal = torch.zeros((), dtype=torch.int64, device=device)
    divergence = torch.zeros((), dtype=torch.float64, device=device)
    pairs = zip(
        model.log_probabilities(chunk_tokens=chunk_tokens, device=device),
        other.log_probabilities(chunk_tokens=chunk_tokens, device=device),
        strict=True,
    )
    for log_q_CV, log_p_CV in pairs:
        equal += (log_q_CV.argmax(-1) == log_p_CV.argmax(-1)).sum()
        divergence += (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(dtype=torch.float64)
    tokens = int(model.counts_N.sum())
    return Agreement(greedy=float(equal) / tokens, kl=float(divergence) / tokens, tokens=tokens)


def _counts(tokens_BT: Tensor, documents: Documents | None) -> Tensor:
    """Positions [B, S] whose label counts in losses."""
    if documents is None:
        return torch.ones_like(tokens_BT[:, 1:], dtype=torch.bool)
    return documents.labels(tokens_BT) != IGNORED_LABEL
