"""Causal language modelling loss without the logits of the whole batch.

Logits exist for `chunk_tokens` tokens at a time. Their gradient is known as soon as they are, so the forward pass
computes the gradients of the hidden states and of the head's weight chunk by chunk and the backward pass only scales
them: no logits are kept and no product is computed twice.

Shapes: B sequences, S positions, N = B * S tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shearing.data.documents import IGNORED_LABEL


def causal_lm_loss(
    hidden_BSD: Tensor,
    head_weight_VD: Tensor,
    labels_BS: Tensor,
    *,
    chunk_tokens: int,
    ignore_index: int = IGNORED_LABEL,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of all tokens that have a label: their sum, and each one's.

    Products run in autocast's dtype where autocast is on; the softmax, the sum and the accumulation of the head's
    gradient over chunks run in fp32 (fp64 for fp64 inputs).

    Args:
        hidden_BSD: last hidden states, after the final norm.
        head_weight_VD: weight of the head, or of the embedding where they are tied.
        labels_BS: the token each position has to predict (already shifted), int64.
        chunk_tokens: tokens whose logits exist at the same time.
        ignore_index: label of positions that do not count.

    Returns:
        The sum, a scalar in nats, whose backward pass can run once; and [B, S] without gradient, 0 where there is no
        label.
    """
    sum_and_losses: tuple[Tensor, Tensor] = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_BSD,
        head_weight_VD,
        labels_BS,
        chunk_tokens,
        ignore_index,
        _product_dtype(hidden_BSD),
        torch.is_grad_enabled(),
    )
    return sum_and_losses


@torch.no_grad()
def per_token_loss(
    hidden_BSD: Tensor,
    head_weight_VD: Tensor,
    labels_BS: Tensor,
    *,
    chunk_tokens: int,
    ignore_index: int = IGNORED_LABEL,
) -> Tensor:
    """Cross-entropy of every token, for evaluation; see `causal_lm_loss` for the arguments.

    Returns:
        [B, S], nats, without gradient; 0 where the label is `ignore_index`.
    """
    labels_N = labels_BS.reshape(-1)
    losses_N = torch.zeros(labels_N.shape, dtype=_sum_dtype(hidden_BSD), device=hidden_BSD.device)
    for tokens, _, log_probabilities_CV in _chunks(
        hidden_BSD, head_weight_VD, chunk_tokens=chunk_tokens, product_dtype=_product_dtype(hidden_BSD)
    ):
        valid_C = labels_N[tokens] != ignore_index
        picked_C1 = log_probabilities_CV.gather(1, labels_N[tokens].where(valid_C, 0)[:, None])
        losses_N[tokens] = -picked_C1[:, 0] * valid_C
    return losses_N.view(labels_BS.shape)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_BSD: Tensor,
        head_weight_VD: Tensor,
        labels_BS: Tensor,
        chunk_tokens: int,
        ignore_index: int,
        product_dtype: torch.dtype,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        labels_N = labels_BS.reshape(-1)
        wants_hidden = with_gradient and ctx.needs_input_grad[0]
        wants_weight = with_gradient and ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=_sum_dtype(hidden_BSD), device=hidden_BSD.device)
        losses_N = torch.empty(labels_N.shape, dtype=loss.dtype, device=loss.device)
        grad_hidden_ND = hidden_BSD.new_empty(labels_N.numel(), hidden_BSD.shape[-1]) if wants_hidden else None
        grad_weight_VD = torch.empty_like(head_weight_VD, dtype=_sum_dtype(head_weight_VD)) if wants_weight else None
        weight_VD = head_weight_VD.to(product_dtype)
        for tokens, hidden_CD, log_probabilities_CV in _chunks(
            hidden_BSD, weight_VD, chunk_tokens=chunk_tokens, product_dtype=product_dtype
        ):
            valid_C = labels_N[tokens] != ignore_index
            labels_C1 = labels_N[tokens].where(valid_C, 0)[:, None]
            picked_C = log_probabilities_CV.gather(1, labels_C1)[:, 0] * valid_C
            losses_N[tokens] = -picked_C
            loss -= picked_C.sum()
            if not wants_hidden and not wants_weight:
                continue
            # d(-log p[label]) / d(logits) = p - onehot(label), and 0 for tokens that do not count.
            grad_CV = log_probabilities_CV.exp_()
            grad_CV.scatter_add_(1, labels_C1, grad_CV.new_full((), -1.0).expand_as(labels_C1))
            grad_CV = grad_CV.mul_(valid_C[:, None]).to(product_dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[tokens] = grad_CV @ weight_VD
            if grad_weight_VD is not None:
                first = tokens.start == 0
                if product_dtype == grad_weight_VD.dtype:
                    torch.addmm(grad_weight_VD, grad_CV.t(), hidden_CD, beta=0 if first else 1, out=grad_weight_VD)
                elif first:
                    grad_weight_VD.copy_(grad_CV.t() @ hidden_CD)
                else:
                    grad_weight_VD.add_(grad_CV.t() @ hidden_CD)
        ctx.gradients = (
            None if grad_hidden_ND is None else grad_hidden_ND.view(hidden_BSD.shape),
            None if grad_weight_VD is None else grad_weight_VD.to(head_weight_VD.dtype),
        )
        losses_BS = losses_N.view(labels_BS.shape)
        ctx.mark_non_differentiable(losses_BS)
        return loss, losses_BS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the backward pass of causal_lm_loss scales its gradients in place and runs only once")
        grad_hidden_BSD, grad_weight_VD = ctx.gradients
        ctx.gradients = None
        # On the device: asking whether the factor is 1 would cost a synchronisation.
        if grad_hidden_BSD is not None:
            grad_hidden_BSD.mul_(grad_loss)
        if grad_weight_VD is not None:
            grad_weight_VD.mul_(grad_loss)
        return grad_hidden_BSD, grad_weight_VD, None, None, None, None, None


def _chunks(
    hidden_BSD: Tensor, head_weight_VD: Tensor, *, chunk_tokens: int, product_dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Token range, hidden states [C, D] and log probabilities [C, V] of each chunk.

    The log probabilities are valid until the next chunk: all chunks share one buffer.
    """
    hidden_ND = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    weight_VD = head_weight_VD.to(product_dtype)
    num_tokens = hidden_ND.shape[0]
    rows = min(chunk_tokens, num_tokens)
    logits_CV = torch.empty(rows, weight_VD.shape[0], dtype=product_dtype, device=hidden_ND.device)
    log_probabilities_CV = torch.empty_like(logits_CV, dtype=_sum_dtype(hidden_BSD))
    for start in range(0, num_tokens, chunk_tokens):
        tokens = slice(start, min(start + chunk_tokens, num_tokens))
        hidden_CD = hidden_ND[tokens].to(product_dtype)
        rows = hidden_CD.shape[0]
        torch.mm(hidden_CD, weight_VD.t(), out=logits_CV[:rows])
        torch.log_softmax(logits_CV[:rows], -1, dtype=log_probabilities_CV.dtype, out=log_probabilities_CV[:rows])
        yield tokens, hidden_CD, log_probabilities_CV[:rows]


def _product_dtype(hidden_BSD: Tensor) -> torch.dtype:
    device_type = hidden_BSD.device.type
    if torch.is_autocast_enabled(device_type) and hidden_BSD.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden_BSD.dtype


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
