"""A teacher's likeliest tokens and the mass of all others: what the divergence `top_k` needs, and it is exact for it.

Shapes: S positions of a row, K tokens that are kept, C tokens of a chunk, V vocabulary. p is the teacher's
distribution, q the student's, P and Q the mass of the tokens that are not kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shearing.objectives.divergences import inner
from shearing.objectives.teacher import Comparison
from shearing.objectives.teacher_cache.form import Form, KeptOnDevice
from shearing.objectives.teacher_cache.said import Said


@dataclass(frozen=True, kw_only=True)
class TopK(Form):
    """`Said.values` are log p of the K tokens, the likeliest first; `Said.rest` is log P.

    Attributes:
        top_k: K.
    """

    name: ClassVar[str] = "top_k"
    kind: ClassVar[str] = "top_k"
    top_k: int

    def taken(self, p_CV: Tensor, log_p_CV: Tensor, noise_CR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Form.taken`; changes `p_CV`."""
        del noise_CR
        log_top_p_CK, top_CK = log_p_CV.topk(self.top_k, -1)
        rest_CV = p_CV.copy_(log_p_CV).scatter_(1, top_CK, -math.inf)
        return top_CK, log_top_p_CK, rest_CV.logsumexp(-1)

    def sorted_out(
        self, ids_SK: npt.NDArray[np.int64], values_SK: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """See `Form.sorted_out`."""
        return ids_SK, values_SK

    def encoded(self, said: Said, *, vocab_size: int) -> bytes:
        """See `Form.encoded`."""
        floats = (said.label_losses, said.entropies, said.rest, said.values)
        parts = [*(part.astype("<f4") for part in floats), said.ids.astype(_of_ids(vocab_size))]
        return b"".join(part.tobytes() for part in parts)

    def decoded(self, stored: bytes, *, positions: int, vocab_size: int) -> Said:
        """See `Form.decoded`."""
        kept = positions * self.top_k
        of_ids = 4 * (3 * positions + kept)
        if len(stored) != of_ids + kept * _of_ids(vocab_size).itemsize:
            raise ValueError(f"{len(stored)} bytes")
        losses, entropies, rest = np.frombuffer(stored, "<f4", 3 * positions).reshape(3, positions)
        values = np.frombuffer(stored, "<f4", kept, 12 * positions)
        ids = np.frombuffer(stored, _of_ids(vocab_size), kept, of_ids).astype(np.int64)
        shape = (positions, self.top_k)
        return Said(losses, entropies, ids.reshape(shape), values.reshape(shape), rest)

    def compared(self, kept: KeptOnDevice, tokens: slice, log_student_CV: Tensor) -> Comparison:
        """See `Form.compared`; the formula is that of `divergences.top_k_and_tail`."""
        dtype = log_student_CV.dtype
        ids_CK = kept.ids[tokens]
        log_p_CK, log_tail_p_C = kept.values[tokens].to(dtype), kept.rest[tokens].to(dtype)
        log_q_CK = log_student_CV.gather(1, ids_CK)
        q_CV, q_CK, p_CK = log_student_CV.exp_(), log_q_CK.exp(), log_p_CK.exp()
        # Summed up and not taken from 1, which would leave nothing of a small mass; where it was, it is put back.
        tail_q_C = q_CV.scatter_(1, ids_CK, 0.0).sum(-1).clamp_min_(torch.finfo(dtype).tiny)
        q_CV.scatter_(1, ids_CK, q_CK)
        log_ratio_C = log_tail_p_C - tail_q_C.log()
        divergences_C = inner(p_CK, log_p_CK - log_q_CK) + log_tail_p_C.exp() * log_ratio_C
        return Comparison(
            divergences_C, kept.label_losses[tokens], AwayFromKept(ids_CK, p_CK, q_CK=q_CK, ratio_C=log_ratio_C.exp())
        )


class AwayFromKept:
    """q - p at the tokens that are kept, q (1 - P / Q) at the others; see `SparseGradient`.

    Args:
        ids_CK: the tokens that are kept.
        p_CK, q_CK: of these.
        ratio_C: P / Q.
    """

    def __init__(self, ids_CK: Tensor, p_CK: Tensor, *, q_CK: Tensor, ratio_C: Tensor) -> None:
        self._ids_CK, self._p_CK, self._q_CK, self._ratio_C = ids_CK, p_CK, q_CK, ratio_C

    def mix_into(self, q_CV: Tensor, weights_C: Tensor) -> None:
        """See `SparseGradient.mix_into`."""
        q_CV.mul_((1 - weights_C * self._ratio_C)[:, None])
        q_CV.scatter_(1, self._ids_CK, self._q_CK - weights_C[:, None] * self._p_CK)


def _of_ids(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
