"""Cross-entropy mixed with the divergence from a teacher's distribution, token by token.

Of token t, with a_t between 0 and 1 and temperature T (Hinton et al., arXiv 1503.02531, section 2; the factor T^2 keeps
the gradient's size):

    L_t = (1 - a_t) CE_t + a_t T^2 D(p_t(T), q_t(T))

Shapes: B sequences, S positions, N = B * S tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from shearing.data.documents import IGNORED_LABEL
from shearing.models.anatomy import Head
from shearing.objectives.chunked import ChunkResult, Scratch, chunked_loss, sum_dtype
from shearing.objectives.teacher import Targets


class DistilledLoss(NamedTuple):
    """Of N tokens; all but the first without gradient, and 0 where there is no label.

    Attributes:
        total: sum of L_t, a scalar in nats, whose backward pass can run once.
        losses: [B, S], cross-entropy.
        teacher_losses: [B, S], the teacher's own cross-entropy.
        divergences: [B, S], D at the temperature, in nats.
        weights: [B, S], a_t.
    """

    total: Tensor
    losses: Tensor
    teacher_losses: Tensor
    divergences: Tensor
    weights: Tensor


def distilled_loss(
    hidden_BSD: Tensor,
    head: Head,
    labels_BS: Tensor,
    *,
    targets: Targets,
    weights_BS: Tensor,
    temperature: float,
    by_label: bool,
    chunk_tokens: int,
) -> DistilledLoss:
    """The mixed loss of all tokens that have a label; see `chunked_loss` for precisions.

    Args:
        hidden_BSD: last hidden states, after the final norm.
        head: of the model.
        labels_BS: the token each position has to predict, int64; `IGNORED_LABEL` where it does not count.
        targets: of these tokens, at the same temperature and in chunks of the same length.
        weights_BS: a_t, between 0 and 1.
        temperature: T.
        by_label: whether a_t is multiplied by the probability that the teacher gives the label.
        chunk_tokens: tokens whose logits exist at the same time.
    """
    rule = _DistilledCrossEntropy(
        labels_BS.reshape(-1),
        targets=targets,
        weights_N=weights_BS.reshape(-1),
        temperature=temperature,
        by_label=by_label,
    )
    total, figures_NK = chunked_loss(hidden_BSD, head, rule=rule, chunk_tokens=chunk_tokens)
    return DistilledLoss(total, *(figure_N.view(labels_BS.shape) for figure_N in figures_NK.unbind(1)))


def without_low_entropy(weights_BS: Tensor, *, entropies_BS: Tensor, counted_BS: Tensor, share: float) -> Tensor:
    """Weights [B, S] with a share of each sequence's tokens at 0: those of which the teacher is surest.

    Where the teacher has little to say beyond the label, as in what is copied from the context, its distribution takes
    away more than it gives (arXiv 2509.01649). The share is of each sequence, so that it depends neither on
    micro-batches nor on chunks.

    Args:
        weights_BS: a_t.
        entropies_BS: of the teacher's distributions.
        counted_BS: bool, tokens that have a label.
        share: of a sequence's counted tokens, rounded down.
    """
    order_BS = entropies_BS.masked_fill(~counted_BS, math.inf).argsort(stable=True, dim=1)
    ranks_BS = order_BS.argsort(1)
    left_out_B1 = (share * counted_BS.sum(1, keepdim=True).double()).floor()
    return weights_BS.where(ranks_BS >= left_out_B1, 0.0)


class _DistilledCrossEntropy:
    """L_t; figures: cross-entropy, the teacher's, divergence, a_t."""

    num_figures = 4

    def __init__(
        self, labels_N: Tensor, *, targets: Targets, weights_N: Tensor, temperature: float, by_label: bool
    ) -> None:
        self._labels_N, self._targets, self._weights_N = labels_N, targets, weights_N
        self._temperature, self._by_label = temperature, by_label
        self._scratch = Scratch()

    def __call__(self, tokens: slice, logits_CV: Tensor, *, with_gradient: bool) -> ChunkResult:
        """See `ChunkLoss`."""
        valid_C = self._labels_N[tokens] != IGNORED_LABEL
        labels_C1 = self._labels_N[tokens].where(valid_C, 0)[:, None]
        dtype = sum_dtype(logits_CV)
        log_CV = self._scratch.take("log probabilities", like=logits_CV, dtype=dtype)
        torch.log_softmax(logits_CV, -1, dtype=dtype, out=log_CV)
        losses_C = -log_CV.gather(1, labels_C1)[:, 0] * valid_C
        tempered_CV = log_CV
        if self._temperature != 1:
            tempered_CV = self._scratch.take("tempered", like=logits_CV, dtype=dtype)
            tempered_CV.copy_(logits_CV).div_(self._temperature)
            tempered_CV.sub_(tempered_CV.logsumexp(-1, keepdim=True))
        divergences_C, teacher_losses_C, toward = self._targets.compare(tokens, tempered_CV, labels_C1)
        divergences_C, teacher_losses_C = divergences_C * valid_C, teacher_losses_C.to(dtype) * valid_C
        weights_C = self._weights_N[tokens].to(dtype) * valid_C
        if self._by_label:
            weights_C = weights_C * (-teacher_losses_C).exp()
        mixed_C = (1 - weights_C) * losses_C + weights_C * self._temperature**2 * divergences_C
        figures_CK = torch.stack([losses_C, teacher_losses_C, divergences_C, weights_C], 1)
        if not with_gradient:
            return ChunkResult(mixed_C, figures_CK, None)
        # With respect to the logits: (1 - a) (q - onehot(label)) + a T dD/d(logits / T).
        grad_CV = log_CV if self._temperature == 1 else log_CV.exp_()  # probabilities, which `compare` has left
        if isinstance(toward, Tensor):
            if self._temperature != 1:
                toward.mul_(self._temperature)
            grad_CV.lerp_(toward, weights_C[:, None])
        else:
            assert self._temperature == 1, "what is kept of a distribution is of one temperature"
            toward.mix_into(grad_CV, weights_C)
        grad_CV.scatter_add_(1, labels_C1, (weights_C - 1)[:, None])
        return ChunkResult(mixed_C, figures_CK, self._scratch.counted(grad_CV, valid_C, dtype=logits_CV.dtype))
