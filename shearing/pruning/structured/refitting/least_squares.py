"""Least squares of a linear correction, from sums over tokens; held-out rows may choose the ridge.

Legend: T tokens, B sequences, S positions; I and O inputs and outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shearing.processes.processes import Processes
from shearing.pruning.calibration.inverse import damped_factors
from shearing.pruning.calibration.statistics import InputStatistics, Need, add_products, weigh

RIDGE = 1.5
"""How strongly refitted weights are held where they are. Small values fit the calibration text, see docs/lab-log.md."""

RIDGES = (0.05, 0.15, 0.5, 1.5, 5.0, 15.0)
"""What held-out rows choose from."""

LEAST_ROWS = 5
"""Of calibration text, so that one of them is held out."""

_BARELY = 1e-9
"""Damping that only keeps inputs which are always zero from making a matrix singular."""

_GOLDEN = 0.6180339887498949

Ridge = float | Literal["auto"]


def held_out(rows: Sequence[int]) -> Tensor:
    """Which rows of a text choose and are not fitted: about a fifth, bool [rows].

    Multiples of the golden ratio are spread evenly however many rows there are, and in step with no number of domains
    that are dealt in turn.

    Args:
        rows: their numbers in the whole text.
    """
    return torch.tensor([(row + 1) * _GOLDEN % 1.0 < 0.2 for row in rows], dtype=torch.bool)


class Solved(NamedTuple):
    """What a fit has found.

    Attributes:
        correction: [inputs that take part, O], transposed.
        intercept: [O]; None where none is fitted.
        ridge: with which.
    """

    correction: Tensor
    intercept: Tensor | None
    ridge: float


class Fit:
    """Normal equations of a linear correction, as sums over tokens: what is read, and what the output lacks.

    Args:
        weight: [O, I], what is corrected.
        columns: indices of the inputs that take part; None: all.
        outputs: number of outputs that lack something.
        ridge: share of the moment's diagonal that is added to it. auto: of `RIDGES`, that whose correction of the other
            rows leaves least on those that are held out; the correction is then that of all rows.
        intercept: whether a constant is fitted beside it.

    Attributes:
        columns: indices of the inputs that take part.
    """

    def __init__(
        self, weight: Tensor, *, columns: Tensor | None, outputs: int, ridge: Ridge, intercept: bool = False
    ) -> None:
        self._all, self._ridge = columns is None, ridge
        self.columns = torch.arange(weight.shape[1], device=weight.device) if columns is None else columns

        def empty() -> _Sums:
            return _Sums(self.columns.numel(), outputs=outputs, intercept=intercept, device=weight.device)

        self._fitted, self._held = empty(), empty() if ridge == "auto" else None

    def add(self, x: Tensor, *, lacks: Tensor, weights: Tensor | None = None, held: Tensor | None = None) -> None:
        """Inputs, what the output lacks, and how much each token counts.

        Args:
            x: [B, S, I].
            lacks: [B, S, O].
            weights: [B, S]; None: all alike.
            held: bool [B], rows that are held out; only where they choose. None: none.
        """
        x = x if self._all else x[..., self.columns]
        if self._held is None or held is None:
            self._fitted.add(x, lacks=lacks, weights=weights)
            return
        for sums, rows in ((self._fitted, ~held), (self._held, held)):
            if bool(rows.any()):
                sums.add(x[rows], lacks=lacks[rows], weights=None if weights is None else weights[rows])

    def solve(self, processes: Processes) -> Solved:
        """The correction, from the sums of all.

        The main process solves, and the others take what it finds: every next sum depends on it to the last bit.
        """
        self._fitted.combine(processes)
        if self._held is not None:
            self._held.combine(processes)
        ridge = torch.zeros((), dtype=torch.float64, device=self._fitted.cross.device)
        correction, intercept = torch.empty_like(self._fitted.cross), self._fitted.lacks
        if processes.is_main:
            ridge.fill_(self._chosen())
            if self._held is not None:
                self._fitted.absorb(self._held)
            correction, intercept = self._fitted.solved(float(ridge))
        processes.share(ridge)
        correction = processes.share(correction)
        return Solved(correction, None if intercept is None else processes.share(intercept), float(ridge))

    def _chosen(self) -> float:
        if self._ridge != "auto":
            return self._ridge
        held = self._held
        if held is None or not float(held.read.tokens):
            return RIDGE
        return min(RIDGES, key=lambda ridge: held.error(*self._fitted.solved(ridge)))


class _Sums:
    """Over tokens that count w each: w x xᵀ, w x yᵀ, and with an intercept w x and w y; y is what the output lacks."""

    def __init__(self, inputs: int, *, outputs: int, intercept: bool, device: torch.device) -> None:
        needs: frozenset[Need] = frozenset({"moment", "sums"} if intercept else {"moment"})
        self.read = InputStatistics(inputs, needs=needs, device=device, dtype=torch.float64)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.lacks = torch.zeros(outputs, dtype=torch.float64, device=device) if intercept else None

    def add(self, x: Tensor, *, lacks: Tensor, weights: Tensor | None) -> None:
        self.read.add(x, weights=weights)
        lacks_TO = lacks.flatten(0, -2).float()
        add_products(self.cross, weigh(x.flatten(0, -2).float(), weights), lacks_TO)
        if self.lacks is not None:
            self.lacks += weigh(lacks_TO, weights).sum(0, dtype=torch.float64)

    def combine(self, processes: Processes) -> None:
        """Add up what all processes saw; the main one has the result."""
        self.read.combine(processes, rank=0)
        for sums in (self.cross, self.lacks):
            if sums is not None:
                processes.sum_on(sums, rank=0)

    def absorb(self, others: _Sums) -> None:
        """Take in the sums of other tokens."""
        self.read.absorb(others.read)
        self.cross += others.cross
        if self.lacks is not None:
            assert others.lacks is not None
            self.lacks += others.lacks

    def solved(self, ridge: float) -> tuple[Tensor, Tensor | None]:
        """The correction [inputs, O] and the constant [O] beside it; the sums stay as they are."""
        products = self.read.products
        if self.lacks is None:
            lower, _ = next(damped_factors(products.clone(), damping=ridge, of="each"))
            return torch.cholesky_solve(self.cross, lower), None
        # The best constant for any correction leaves what is around the means; what holds weights stays as it is.
        mean = self.read.mean
        centred = products - self.read.tokens * mean[:, None] * mean
        centred.diagonal().add_(ridge * products.diagonal())
        lower, _ = next(damped_factors(centred, damping=_BARELY, of="each"))
        correction = torch.cholesky_solve(self.cross - mean[:, None] * self.lacks, lower)
        return correction, self.lacks / self.read.tokens - mean @ correction

    def error(self, correction: Tensor, intercept: Tensor | None) -> float:
        """Σ w |y - Dᵀ x - b|² without Σ w |y|², which no D and b change."""
        left = ((self.read.products @ correction - 2 * self.cross) * correction).sum()
        if intercept is not None:
            assert self.lacks is not None
            sums = self.read.mean * self.read.tokens
            left = left + (intercept * (self.read.tokens * intercept + 2 * (sums @ correction - self.lacks))).sum()
        return float(left)
