"""How far a student's distribution is from its teacher's, and the gradient of that: one function for each kind.

All take log-probabilities, those of the student first, at whatever temperature they are; the gradient is with respect
to what the student's softmax was taken of. Nothing of size [C, V] is allocated but the named scratch.

Shapes: C tokens, V vocabulary, K tokens that are kept. p is the teacher's distribution, q the student's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pkgutil import resolve_name
from typing import TypeAlias

import torch
from torch import Tensor

from shearing.objectives.chunked import Scratch
from shearing.objectives.registry import DIVERGENCES

Divergence: TypeAlias = Callable[[Tensor, Tensor, Scratch], Tensor]
"""From log q [C, V], log p [C, V] and scratch to the divergence of each token [C], in nats.

It leaves q in place of log q, and in place of log p the gradient with respect to the student's softmax's input."""


def divergence_of(name: str, *, top_k: int) -> Divergence:
    """The divergence of a name.

    Args:
        name: one of `DIVERGENCES`.
        top_k: K, of the kind that keeps only some tokens.
    """
    function = resolve_name(DIVERGENCES[name].home)
    return partial(function, top_k=top_k) if DIVERGENCES[name].keeps_some else function


def forward_kl(log_q_CV: Tensor, log_p_CV: Tensor, scratch: Scratch) -> Tensor:
    """KL(p || q) = sum p log(p / q); gradient q - p (Hinton et al., arXiv 1503.02531, section 2)."""
    p_CV = torch.exp(log_p_CV, out=scratch.take("p", like=log_p_CV, dtype=log_p_CV.dtype))
    divergence_C = inner(p_CV, log_p_CV.sub_(log_q_CV))
    torch.sub(log_q_CV.exp_(), p_CV, out=log_p_CV)
    return divergence_C


def reverse_kl(log_q_CV: Tensor, log_p_CV: Tensor, scratch: Scratch) -> Tensor:
    """KL(q || p) = sum q log(q / p); gradient q (log(q / p) - KL) (MiniLLM, arXiv 2306.08543, equation 1)."""
    del scratch
    log_ratio_CV = torch.sub(log_q_CV, log_p_CV, out=log_p_CV)
    q_CV = log_q_CV.exp_()
    divergence_C = inner(q_CV, log_ratio_CV)
    log_ratio_CV.sub_(divergence_C[:, None]).mul_(q_CV)
    return divergence_C


def jensen_shannon(log_q_CV: Tensor, log_p_CV: Tensor, scratch: Scratch) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; gradient q (log(q / m) - KL(q || m)) / 2.

    The generalised divergence of Agarwal et al. (GKD, arXiv 2306.13649, equation 1) at beta = 1/2.
    """
    log_m_CV = scratch.take("m", like=log_q_CV, dtype=log_q_CV.dtype)
    torch.logaddexp(log_q_CV, log_p_CV, out=log_m_CV).sub_(math.log(2))
    p_CV = torch.exp(log_p_CV, out=scratch.take("p", like=log_p_CV, dtype=log_p_CV.dtype))
    of_teacher_C = inner(p_CV, log_p_CV.sub_(log_m_CV))
    log_ratio_CV = torch.sub(log_q_CV, log_m_CV, out=log_p_CV)
    q_CV = log_q_CV.exp_()
    of_student_C = inner(q_CV, log_ratio_CV)
    log_ratio_CV.sub_(of_student_C[:, None]).mul_(q_CV).mul_(0.5)
    return (of_teacher_C + of_student_C) / 2


def top_k_and_tail(log_q_CV: Tensor, log_p_CV: Tensor, scratch: Scratch, *, top_k: int) -> Tensor:
    """KL of the distributions over the teacher's K likeliest tokens and one class more, all the others together.

    sum_K p log(p / q) + P log(P / Q) with P, Q the mass of the others; gradient q - p at the K tokens, and
    q (1 - P / Q) at the others. Without that class the optimum would have no tail and be over-confident (Anshumann et
    al., arXiv 2503.16870, section 3, where it is called a ghost token).
    """
    rest_CV = scratch.take("rest", like=log_q_CV, dtype=log_q_CV.dtype)
    log_top_p_CK, top_CK = log_p_CV.topk(top_k, -1)
    log_top_q_CK = log_q_CV.gather(1, top_CK)
    log_tail_p_C, log_tail_q_C = (
        torch.logsumexp(rest_CV.copy_(log_CV).scatter_(1, top_CK, -math.inf), -1) for log_CV in (log_p_CV, log_q_CV)
    )
    log_tail_ratio_C = log_tail_p_C - log_tail_q_C
    top_p_CK = log_top_p_CK.exp()
    divergence_C = inner(top_p_CK, log_top_p_CK - log_top_q_CK) + log_tail_p_C.exp() * log_tail_ratio_C
    # q P / Q, from logarithms: P / Q alone may be beyond what fp32 holds.
    torch.add(log_q_CV, log_tail_ratio_C[:, None], out=rest_CV).exp_()
    torch.sub(log_q_CV.exp_(), rest_CV, out=log_p_CV)
    log_p_CV.scatter_(1, top_CK, log_top_q_CK.exp() - top_p_CK)
    return divergence_C


def inner(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    """Inner product of each row, [C], in its own dtype under autocast too, without a product of size [C, V]."""
    with torch.autocast(a_CV.device.type, enabled=False):
        return torch.bmm(a_CV[:, None], b_CV[..., None])[:, 0, 0]
