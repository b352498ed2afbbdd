"""A loss over the logits of all tokens, which exist for a few tokens at a time.

The gradient of a chunk's logits is known as soon as they are, so the forward pass computes the gradients of the hidden
states and of the head's weight chunk by chunk and the backward pass only scales them: no logits are kept and no product
is computed twice. What a token's loss is, a rule says (`ChunkLoss`).

Shapes: B sequences, S positions, N = B * S tokens, D hidden size, V vocabulary, C tokens of a chunk, K figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shearing.models.anatomy import Head


class ChunkResult(NamedTuple):
    """What a rule makes of a chunk's logits.

    Attributes:
        losses: [C], of each token, in nats.
        figures: [C, K], what else is to be known of each token; without gradient.
        gradient: [C, V], of the sum of the losses with respect to the logits, in the products' dtype; None where it is
            not asked for. Valid until the rule is called again.
    """

    losses: Tensor
    figures: Tensor
    gradient: Tensor | None


class ChunkLoss(Protocol):
    """Says what the loss of each token is."""

    num_figures: int

    def __call__(self, tokens: slice, logits_CV: Tensor, *, with_gradient: bool) -> ChunkResult:
        """The losses of a chunk.

        Args:
            tokens: which of the N; chunks come in order, all but the last of the same length.
            logits_CV: of the head, in the products' dtype.
            with_gradient: whether the gradient is asked for.
        """
        ...


class Scratch:
    """Buffers that chunks share: the first chunk, which is the longest, allocates them."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The buffer of a name, of the shape of `like`; its content is what was left there."""
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = torch.empty_like(like, dtype=dtype)
        return buffer[: like.shape[0]]

    def counted(self, gradient_CV: Tensor, valid_C: Tensor, *, dtype: torch.dtype) -> Tensor:
        """A gradient in the products' dtype, 0 for tokens that do not count; in place where that is its own."""
        own = gradient_CV.dtype == dtype
        out_CV = gradient_CV if own else self.take("gradient", like=gradient_CV, dtype=dtype)
        return torch.mul(gradient_CV, valid_C[:, None], out=out_CV)


def chunked_loss(hidden_BSD: Tensor, head: Head, *, rule: ChunkLoss, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """Sum of a rule's losses over all tokens, and its figures of each.

    Products run in autocast's dtype where autocast is on; the sum and the accumulation of the head's gradient over
    chunks run in fp32 (fp64 for fp64 inputs).

    Args:
        hidden_BSD: last hidden states, after the final norm.
        head: of the model.
        rule: of these tokens alone.
        chunk_tokens: tokens whose logits exist at the same time.

    Returns:
        The sum, a scalar in nats, whose backward pass can run once; and the figures [N, K], without gradient.
    """
    sum_and_figures: tuple[Tensor, Tensor] = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_BSD, head.weight, head, rule, chunk_tokens, product_dtype(hidden_BSD), torch.is_grad_enabled()
    )
    return sum_and_figures


def chunked_logits(hidden_BSD: Tensor, head: Head, *, chunk_tokens: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Token range, hidden states [C, D] and logits [C, V] of each chunk, in the head's dtype.

    The logits are valid until the next chunk: all chunks share one buffer.
    """
    weight_VD = head.weight
    hidden_ND = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    num_tokens = hidden_ND.shape[0]
    logits_CV = weight_VD.new_empty(min(chunk_tokens, num_tokens), weight_VD.shape[0])
    for start in range(0, num_tokens, chunk_tokens):
        tokens = slice(start, min(start + chunk_tokens, num_tokens))
        hidden_CD = hidden_ND[tokens].to(weight_VD.dtype)
        rows = hidden_CD.shape[0]
        torch.mm(hidden_CD, weight_VD.t(), out=logits_CV[:rows])
        yield tokens, hidden_CD, head.finish_(logits_CV[:rows])


def product_dtype(hidden_BSD: Tensor) -> torch.dtype:
    """Dtype of the head's products: autocast's where it is on."""
    device_type = hidden_BSD.device.type
    if torch.is_autocast_enabled(device_type) and hidden_BSD.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden_BSD.dtype


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of softmaxes and sums."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_BSD: Tensor,
        head_weight_VD: Tensor,
        head: Head,
        rule: ChunkLoss,
        chunk_tokens: int,
        product_dtype: torch.dtype,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        num_tokens = hidden_BSD.shape[:-1].numel()
        wants_hidden = with_gradient and ctx.needs_input_grad[0]
        wants_weight = with_gradient and ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=sum_dtype(hidden_BSD), device=hidden_BSD.device)
        figures_NK = torch.empty(num_tokens, rule.num_figures, dtype=loss.dtype, device=loss.device)
        grad_hidden_ND = hidden_BSD.new_empty(num_tokens, hidden_BSD.shape[-1]) if wants_hidden else None
        grad_weight_VD = torch.empty_like(head_weight_VD, dtype=sum_dtype(head_weight_VD)) if wants_weight else None
        head = head.with_weight(head_weight_VD.to(product_dtype))
        for tokens, hidden_CD, logits_CV in chunked_logits(hidden_BSD, head, chunk_tokens=chunk_tokens):
            result = rule(tokens, logits_CV, with_gradient=wants_hidden or wants_weight)
            loss += result.losses.sum()
            figures_NK[tokens] = result.figures
            if result.gradient is None:
                continue
            grad_CV = head.backward_(result.gradient, logits_CV=logits_CV)
            if grad_hidden_ND is not None:
                grad_hidden_ND[tokens] = grad_CV @ head.weight
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
        ctx.mark_non_differentiable(figures_NK)
        return loss, figures_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the backward pass of a chunked loss scales its gradients in place and runs only once")
        grad_hidden_BSD, grad_weight_VD = ctx.gradients
        ctx.gradients = None
        # On the device: asking whether the factor is 1 would cost a synchronisation.
        if grad_hidden_BSD is not None:
            grad_hidden_BSD.mul_(grad_loss)
        if grad_weight_VD is not None:
            grad_weight_VD.mul_(grad_loss)
        return grad_hidden_BSD, grad_weight_VD, None, None, None, None, None
