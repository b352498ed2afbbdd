"""Patterns: which weights may be kept together. Each turns scores into a mask, and says whether a mask obeys it.

N:M means N kept of M. Legend: O outputs (rows), I inputs (columns) of a matrix; masks are true where a weight is kept.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from shearing.errors import ShearingError

CUMULATIVE_TOLERANCE = 0.001
"""How near the cumulative rule comes to its target, and how narrow its bracket gets (released code of Wanda)."""


class Pattern(ABC):
    """What may be kept of a matrix. Ties go as in `torch.topk`."""

    @property
    @abstractmethod
    def density(self) -> Fraction:
        """Share of the weights that is kept."""

    @property
    @abstractmethod
    def in_words(self) -> str:
        """The pattern as a person says it."""

    @property
    def whole_rows(self) -> bool:
        """Whether a choice needs all columns of a row at once."""
        return False

    @property
    def columns_at_once(self) -> int | None:
        """Columns over which one choice is made; None: any number."""
        return None

    @abstractmethod
    def keep(self, scores: Tensor, *, first: int = 0) -> Tensor:
        """Mask of neighbouring columns.

        Choosing columns part by part, left to right, keeps as many as choosing them at once.

        Args:
            scores: [O, columns], higher is kept; finite, or -inf of what is gone already and goes first.
            first: index of the first of these columns in the whole matrix.

        Returns:
            [O, columns] bool, true where kept.
        """

    @abstractmethod
    def holds(self, mask: Tensor) -> bool:
        """Whether the mask [O, I] of a whole matrix keeps no more than the pattern does, and none that it would not."""

    def check(self, *, rows: int, columns: int, name: str) -> None:
        """Raises `ShearingError` if a matrix of this size cannot have the pattern."""
        del rows, columns, name


@dataclass(frozen=True)
class KeptOf(Pattern):
    """N:M: of each M consecutive inputs of a row, N are kept (2:4 is what sparse tensor cores read)."""

    kept: int
    of: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    @property
    def density(self) -> Fraction:
        return Fraction(self.kept, self.of)

    @property
    def in_words(self) -> str:
        return f"{self.kept} kept of {self.of}"

    @property
    def columns_at_once(self) -> int | None:
        return self.of

    def keep(self, scores: Tensor, *, first: int = 0) -> Tensor:
        assert first % self.of == 0
        groups = scores.reshape(scores.shape[0], -1, self.of)
        dropped = groups.topk(self.of - self.kept, dim=-1, largest=False, sorted=False).indices
        mask = torch.ones_like(groups, dtype=torch.bool)
        return mask.scatter_(-1, dropped, value=False).view(scores.shape)

    def holds(self, mask: Tensor) -> bool:
        if mask.shape[1] % self.of:
            return False
        return bool((mask.reshape(mask.shape[0], -1, self.of).sum(-1) <= self.kept).all())

    def check(self, *, rows: int, columns: int, name: str) -> None:
        del rows
        if columns % self.of:
            divisors = [m for m in range(2, 33) if columns % m == 0]
            raise ShearingError(
                "pattern",
                value=f"{self} ({self.in_words})",
                allowed=f"an M that divides the {columns} inputs of {name}: {', '.join(map(str, divisors)) or 'none'}",
                mend="choose another N:M (N kept of M), an unstructured --sparsity, or exclude that matrix",
            )


@dataclass(frozen=True)
class PerRow(Pattern):
    """Unstructured: each row loses the same number of weights, those of lowest score."""

    sparsity: Fraction

    def __str__(self) -> str:
        return f"row {float(self.sparsity)!r}"

    @property
    def density(self) -> Fraction:
        return 1 - self.sparsity

    @property
    def in_words(self) -> str:
        return f"{100 * float(self.sparsity):g} % of each row removed"

    def keep(self, scores: Tensor, *, first: int = 0) -> Tensor:
        count = self._dropped(first + scores.shape[1]) - self._dropped(first)
        dropped = scores.topk(count, dim=1, largest=False, sorted=False).indices
        return torch.ones_like(scores, dtype=torch.bool).scatter_(1, dropped, value=False)

    def holds(self, mask: Tensor) -> bool:
        return bool(((~mask).sum(1) >= self._dropped(mask.shape[1])).all())

    def _dropped(self, columns: int) -> int:
        return math.floor(self.sparsity * columns)


@dataclass(frozen=True)
class PerLayer(Pattern):
    """Unstructured: the matrix loses its weights of lowest score, whichever rows they are in."""

    sparsity: Fraction

    def __str__(self) -> str:
        return f"layer {float(self.sparsity)!r}"

    @property
    def density(self) -> Fraction:
        return 1 - self.sparsity

    @property
    def in_words(self) -> str:
        return f"{100 * float(self.sparsity):g} % of each matrix removed"

    def keep(self, scores: Tensor, *, first: int = 0) -> Tensor:
        rows, columns = scores.shape
        count = self._dropped(rows * (first + columns)) - self._dropped(rows * first)
        dropped = scores.flatten().topk(count, largest=False, sorted=False).indices
        mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
        mask[dropped] = False
        return mask.view(scores.shape)

    def holds(self, mask: Tensor) -> bool:
        return int((~mask).sum()) >= self._dropped(mask.numel())

    def _dropped(self, weights: int) -> int:
        return math.floor(self.sparsity * weights)


@dataclass(frozen=True)
class Cumulative(Pattern):
    """Unstructured: each row loses its lowest scores up to a share alpha of the row's total, rows differing in number.

    One alpha for all rows is bisected in [0, 0.8] until the matrix is within 0.001 of the target (the variant in the
    code that was released with arXiv 2306.11695). Where that ends further away, as near 0 and 1, alpha is the one below
    1 that comes nearest: each row keeps a weight, so that short rows cannot lose nearly all.
    """

    sparsity: Fraction

    def __str__(self) -> str:
        return f"cumulative {float(self.sparsity)!r}"

    @property
    def density(self) -> Fraction:
        return 1 - self.sparsity

    @property
    def in_words(self) -> str:
        return (
            f"about {100 * float(self.sparsity):g} % of each matrix removed, the same share of each row's total score"
        )

    @property
    def whole_rows(self) -> bool:
        return True

    def keep(self, scores: Tensor, *, first: int = 0) -> Tensor:
        assert first == 0
        ascending, order = scores.float().sort(dim=1, stable=True)
        ascending = ascending.clamp(min=0.0)
        cumulative, total = ascending.cumsum(1), ascending.sum(1, keepdim=True)
        dropped = self._bisected(cumulative, total)
        if self._missed_by(dropped) > CUMULATIVE_TOLERANCE:
            dropped = self._nearest(cumulative, total)
        return torch.empty_like(dropped).scatter_(1, order, ~dropped)

    def _bisected(self, cumulative: Tensor, total: Tensor) -> Tensor:
        """What goes [O, I], scores of a row rising, as the released code finds it."""
        alpha, low, high = 0.4, 0.0, 0.8
        target = float(self.sparsity)
        dropped = cumulative <= alpha * total
        while True:
            reached = float(dropped.sum()) / dropped.numel()
            if abs(reached - target) <= CUMULATIVE_TOLERANCE or high - low < CUMULATIVE_TOLERANCE:
                return dropped
            if reached > target:
                alpha, high = (alpha + low) / 2, alpha
            else:
                alpha, low = (alpha + high) / 2, alpha
            dropped = cumulative <= alpha * total

    def _nearest(self, cumulative: Tensor, total: Tensor) -> Tensor:
        """The same with the alpha that comes nearest of all: a weight's own share of its row's total."""
        shares = (cumulative / total).nan_to_num_(nan=0.0)  # a row of zeros goes first
        shares[:, -1] = torch.inf  # alpha stays below 1, at which all would go
        alpha = shares.flatten().kthvalue(max(1, round(self.sparsity * shares.numel()))).values
        return min((shares <= alpha) & shares.isfinite(), shares < alpha, key=self._missed_by)

    def _missed_by(self, dropped: Tensor) -> float:
        return abs(float(dropped.sum()) / dropped.numel() - float(self.sparsity))

    def holds(self, mask: Tensor) -> bool:
        del mask  # any number in any row; how near the target it came is in the manifest
        return True


_UNSTRUCTURED: dict[str, type[PerRow | PerLayer | Cumulative]] = {
    "row": PerRow,
    "layer": PerLayer,
    "cumulative": Cumulative,
}


def exact(number: float | str) -> Fraction:
    """The number as it is written in decimals: 0.29 of 100 is 29, which it is not in binary."""
    return Fraction(str(number))


def unstructured(sparsity: Fraction, *, group: str) -> Pattern:
    """The pattern that compares weights within `group`: row, layer or cumulative."""
    return _UNSTRUCTURED[group](sparsity)


def is_pattern(text: str) -> bool:
    """Whether `pattern_of` can read it."""
    try:
        pattern_of(text)
    except ShearingError:
        return False
    return True


def is_like(one: str, other: str) -> bool:
    """Whether both patterns, as they print, are unstructured, or N:M with the same M."""
    patterns = pattern_of(one), pattern_of(other)
    first, second = (pattern.of if isinstance(pattern, KeptOf) else None for pattern in patterns)
    return first == second


def runs_on_2_4(pattern: Pattern) -> bool:
    """Whether any mask of the pattern is a 2:4 mask: at most 2 kept of each 4 inputs that begin at a multiple of 4.

    The N that are kept of M may all lie side by side: N up to 2 never put more than 2 into 4. A group of 1 or 2 inputs
    lies inside one 4 and 4 / M of them do; where M is neither a divisor nor a multiple of 4, a 4 may lie across two
    groups.
    """
    if not isinstance(pattern, KeptOf):
        return False
    if 4 % pattern.of == 0:
        return pattern.kept * (4 // pattern.of) <= 2
    return pattern.kept <= (2 if pattern.of % 4 == 0 else 1)


def pattern_of(text: str) -> Pattern:
    """The pattern that prints as `text`: "2:4", "row 0.5", "layer 0.5", "cumulative 0.5".

    Raises:
        ShearingError: no pattern prints so.
    """
    if of := re.fullmatch(r"(\d+):(\d+)", text):
        kept, group = int(of[1]), int(of[2])
        if 1 <= kept <= group:
            return KeptOf(kept, group)
    elif of := re.fullmatch(r"(row|layer|cumulative) (0\.\d+|\d[\d.]*e-\d+)", text):
        return unstructured(exact(of[2]), group=of[1])
    raise ShearingError(
        "pattern",
        value=text,
        allowed="N:M, N kept of each M consecutive inputs, 1 ≤ N ≤ M, as 2:4; or row, layer or cumulative and a share",
        mend="write 2:4 to keep 2 of 4",
    )
