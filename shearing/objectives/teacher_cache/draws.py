"""Draws from a teacher's distribution, with replacement: what they say of it is right on average, tail and all.

With c of N draws of a token, p^ = c / N has p as its mean, so sum -p^ log q has KL(p || q) plus the entropy of p as its
mean and its gradient q - p^ has KL's own, q - p. The likeliest K tokens alone would take the tail away (Anshumann et
al., arXiv 2503.16870, section 4). As the entropy is kept too, the divergence itself can be told: it is right on
average, and below 0 for some tokens.

Numbers are made of (seed, domain, row) by SplitMix64. Probabilities are counted in whole units of 2^-40 before they are
summed up: sums of integers are the same in any order, so what is drawn does not depend on how a device adds.

Shapes: S positions of a row, N draws, K different tokens among them, C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shearing.data.splitmix64 import INCREMENT, mixed
from shearing.objectives.divergences import inner
from shearing.objectives.teacher import Comparison
from shearing.objectives.teacher_cache.form import Form, KeptOnDevice
from shearing.objectives.teacher_cache.said import Said

MOST_DRAWS = 256
_UNITS = 2.0**40
_TOKENS_AT_ONCE = 256
"""Whose sums of units, in eight bytes a token of the vocabulary, exist at the same time."""


@dataclass(frozen=True, kw_only=True)
class Draws(Form):
    """`Said.values` are shares of the draws; `Said.rest` is nothing.

    On disk a position's draws are in ascending order. One bit of each but the first says whether it is another token
    than the draw before it; then come, of those that are, the lower 16 bits of all, and the bits above. So a token
    takes 16 to 18 bits, however often it is drawn, and a position 6 bytes more for 50 draws, beside its two figures.

    Attributes:
        draws: N.
        seed: of the random numbers.
    """

    name: ClassVar[str] = "draws"
    kind: ClassVar[str] = "forward_kl"
    draws: int
    seed: int

    def noise(self, domain: str, row: int, *, positions: int) -> npt.NDArray[np.float64]:
        """See `Form.noise`; [S, N]."""
        named = repr((self.seed, domain, row)).encode()
        first = int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "big")
        steps = np.arange(1, positions * self.draws + 1, dtype=np.uint64)
        words = mixed(np.uint64(first) + steps * np.uint64(INCREMENT))
        numbers: npt.NDArray[np.float64] = (words >> np.uint64(11)) * 2.0**-53
        return numbers.reshape(positions, self.draws)

    def taken(self, p_CV: Tensor, log_p_CV: Tensor, noise_CR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Form.taken`; ids [C, N] are those of the draws, in ascending order, and have no values."""
        del log_p_CV
        found = []
        for some_p_CV, some_noise_CR in zip(p_CV.split(_TOKENS_AT_ONCE), noise_CR.split(_TOKENS_AT_ONCE), strict=True):
            sums_CV = (some_p_CV * _UNITS).to(torch.int64).cumsum(-1)
            all_C1 = sums_CV[:, -1:]
            places_CR = (some_noise_CR * all_C1).floor().to(torch.int64).minimum(all_C1 - 1)
            found.append(torch.searchsorted(sums_CV, places_CR.sort(-1).values, right=True))
        ids_CR = torch.cat(found)
        return ids_CR, p_CV.new_zeros(len(p_CV), 0), p_CV.new_zeros(len(p_CV))

    def sorted_out(
        self, ids_SK: npt.NDArray[np.int64], values_SK: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """See `Form.sorted_out`."""
        del values_SK
        first_SN = np.ones(ids_SK.shape, dtype=np.bool_)
        first_SN[:, 1:] = ids_SK[:, 1:] != ids_SK[:, :-1]
        return self._by_position(ids_SK[first_SN], first_SN)

    def encoded(self, said: Said, *, vocab_size: int) -> bytes:
        """See `Form.encoded`."""
        counts_SK = np.rint(said.values * self.draws).astype(np.int64)
        counts = counts_SK[counts_SK > 0]
        first_SN = np.zeros((len(said.ids), self.draws), dtype=np.bool_)
        first_SN.ravel()[np.cumsum(counts) - counts] = True
        ids = said.ids[counts_SK > 0]
        above = np.arange(16, max(16, (vocab_size - 1).bit_length()))
        parts = (
            said.label_losses.astype("<f4"),
            said.entropies.astype("<f4"),
            np.packbits(first_SN[:, 1:]),
            (ids & 0xFFFF).astype("<u2"),
            np.packbits((ids[:, None] >> above & 1).astype(np.bool_)),
        )
        return b"".join(part.tobytes() for part in parts)

    def decoded(self, stored: bytes, *, positions: int, vocab_size: int) -> Said:
        """See `Form.decoded`."""
        above = np.arange(16, max(16, (vocab_size - 1).bit_length()))
        flags, of_flags = positions * (self.draws - 1), 8 * positions
        of_low = of_flags + -(-flags // 8)
        if len(stored) < of_low:
            raise ValueError(f"{len(stored)} bytes")
        losses, entropies = np.frombuffer(stored, "<f4", 2 * positions).reshape(2, positions)
        first_SN = np.ones((positions, self.draws), dtype=np.bool_)
        packed = np.frombuffer(stored, np.uint8, of_low - of_flags, of_flags)
        first_SN[:, 1:] = np.unpackbits(packed, count=flags).reshape(positions, self.draws - 1)
        different = int(first_SN.sum())
        of_above = of_low + 2 * different
        if len(stored) != of_above + -(-different * len(above) // 8):
            raise ValueError(f"{len(stored)} bytes")
        ids = np.frombuffer(stored, "<u2", different, of_low).astype(np.int64)
        if len(above):
            bits = np.unpackbits(np.frombuffer(stored, np.uint8, offset=of_above), count=different * len(above))
            ids |= bits.reshape(different, len(above)).astype(np.int64) @ (1 << above)
        ids_SK, values_SK = self._by_position(ids, first_SN)
        return Said(losses, entropies, ids_SK, values_SK, np.zeros(positions, dtype=np.float32))

    def compared(self, kept: KeptOnDevice, tokens: slice, log_student_CV: Tensor) -> Comparison:
        """See `Form.compared`."""
        ids_CK = kept.ids[tokens]
        shares_CK = kept.values[tokens].to(log_student_CV.dtype)
        divergences_C = -inner(shares_CK, log_student_CV.gather(1, ids_CK)) - kept.entropies[tokens]
        log_student_CV.exp_()
        return Comparison(divergences_C, kept.label_losses[tokens], AwayFromShares(ids_CK, shares_CK))

    def _by_position(
        self, ids: npt.NDArray[np.int64], first_SN: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Rows of equal length, [S, K]: ids and shares.

        Args:
            ids: the different tokens of all positions, in order.
            first_SN: which draws are the first of their token.
        """
        lengths_S = first_SN.sum(1)
        there_SK = np.arange(lengths_S.max()) < lengths_S[:, None]
        ids_SK = np.zeros(there_SK.shape, dtype=np.int64)
        values_SK = np.zeros(there_SK.shape, dtype=np.float32)
        ids_SK[there_SK] = ids
        values_SK[there_SK] = np.diff(np.flatnonzero(first_SN), append=first_SN.size) / self.draws
        return ids_SK, values_SK


class AwayFromShares:
    """q - p^; see `SparseGradient`.

    Args:
        ids_CK: tokens of the vocabulary.
        shares_CK: p^ of each; 0 where there are fewer.
    """

    def __init__(self, ids_CK: Tensor, shares_CK: Tensor) -> None:
        self._ids_CK, self._shares_CK = ids_CK, shares_CK

    def mix_into(self, q_CV: Tensor, weights_C: Tensor) -> None:
        """See `SparseGradient.mix_into`."""
        q_CV.scatter_add_(1, self._ids_CK, self._shares_CK * -weights_C[:, None])
