"""Causal language modelling loss without the logits of the whole batch.

Shapes: B sequences, S positions, N = B * S tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shearing.data.documents import IGNORED_LABEL
from shearing.models.anatomy import Head
from shearing.objectives.chunked import ChunkResult, Scratch, chunked_logits, chunked_loss, product_dtype, sum_dtype


def causal_lm_loss(
    hidden_BSD: Tensor,
    head: Head,
    labels_BS: Tensor,
    *,
    chunk_tokens: int,
    ignore_index: int = IGNORED_LABEL,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of all tokens that have a label: their sum, and each one's; see `chunked_loss`.

    Args:
        hidden_BSD: last hidden states, after the final norm.
        head: of the model.
        labels_BS: the token each position has to predict (already shifted), int64.
        chunk_tokens: tokens whose logits exist at the same time.
        ignore_index: label of positions that do not count.

    Returns:
        The sum, a scalar in nats, whose backward pass can run once; and [B, S] without gradient, 0 where there is no
        label.
    """
    rule = _CrossEntropy(labels_BS.reshape(-1), ignore_index=ignore_index)
    total, losses_N1 = chunked_loss(hidden_BSD, head, rule=rule, chunk_tokens=chunk_tokens)
    return total, losses_N1.view(labels_BS.shape)


@torch.no_grad()
def per_token_loss(
    hidden_BSD: Tensor,
    head: Head,
    labels_BS: Tensor,
    *,
    chunk_tokens: int,
    ignore_index: int = IGNORED_LABEL,
) -> Tensor:
    """Cross-entropy of every token, for evaluation; see `causal_lm_loss` for the arguments.

    Returns:
        [B, S], nats, without gradient; 0 where the label is `ignore_index`.
    """
    rule = _CrossEntropy(labels_BS.reshape(-1), ignore_index=ignore_index)
    head = head.with_weight(head.weight.to(product_dtype(hidden_BSD)))
    losses_N = torch.empty(labels_BS.numel(), dtype=sum_dtype(hidden_BSD), device=hidden_BSD.device)
    for tokens, _, logits_CV in chunked_logits(hidden_BSD, head, chunk_tokens=chunk_tokens):
        losses_N[tokens] = rule(tokens, logits_CV, with_gradient=False).losses
    return losses_N.view(labels_BS.shape)


class _CrossEntropy:
    """-log p[label]; its only figure is the loss itself."""

    num_figures = 1

    def __init__(self, labels_N: Tensor, *, ignore_index: int) -> None:
        self._labels_N, self._ignore_index = labels_N, ignore_index
        self._scratch = Scratch()

    def __call__(self, tokens: slice, logits_CV: Tensor, *, with_gradient: bool) -> ChunkResult:
        """See `ChunkLoss`."""
        valid_C = self._labels_N[tokens] != self._ignore_index
        labels_C1 = self._labels_N[tokens].where(valid_C, 0)[:, None]
        log_CV = self._scratch.take("log probabilities", like=logits_CV, dtype=sum_dtype(logits_CV))
        torch.log_softmax(logits_CV, -1, dtype=log_CV.dtype, out=log_CV)
        losses_C = -log_CV.gather(1, labels_C1)[:, 0] * valid_C
        if not with_gradient:
            return ChunkResult(losses_C, losses_C[:, None], None)
        # d(-log p[label]) / d(logits) = p - onehot(label), and 0 for tokens that do not count.
        grad_CV = log_CV.exp_()
        grad_CV.scatter_add_(1, labels_C1, grad_CV.new_full((), -1.0).expand_as(labels_C1))
        return ChunkResult(losses_C, losses_C[:, None], self._scratch.counted(grad_CV, valid_C, dtype=logits_CV.dtype))
