"""What calibration text says about the inputs of a linear layer: sums over tokens, and means read off them.

Sums and counts stay apart until they are read, so that what several batches or processes saw can be added up.

Legend: n sequences, S tokens each, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from shearing.processes.processes import Processes
from shearing.pruning.calibration.inverse import InverseFactor

Need = Literal["sums", "squares", "moment", "gradients"]
"""Of what a matrix reads; gradients are of its weights, and gathered before (`gather_gradients`)."""


class InputStatistics:
    """Statistics of the inputs that one or more linear layers read; products in fp32, whatever they are.

    Args:
        columns: I.
        needs: which of them are collected.
        device: where.
        damping: of `factor`; see `damped_factors`.
        dtype: of what is told of them. Sums and squares are added up in fp64 where both are wanted, since a variance is
            the small difference of large numbers.

    Attributes:
        sequences: how many were added.
        tokens: sum of the weights of their tokens, a scalar fp64 on the device.
        gradients: of one matrix that reads these inputs, the root of the mean over sequences of (∂l/∂w)² [O, I], on the
            CPU; None unless `with_gradients` made this.
        length: S of the sequences whose gradients these are; 0 without.
    """

    def __init__(
        self,
        columns: int,
        *,
        needs: frozenset[Need],
        device: torch.device,
        damping: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.sequences = 0
        self.gradients: Tensor | None = None
        self.length = 0
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self._damping, self._dtype = damping, dtype
        exact = torch.float64 if {"sums", "squares"} <= needs else dtype
        self._sums = torch.zeros(columns, dtype=exact, device=device) if "sums" in needs else None
        self._squares = torch.zeros(columns, dtype=exact, device=device) if "squares" in needs else None
        self._products = torch.zeros(columns, columns, dtype=dtype, device=device) if "moment" in needs else None
        self._factor: list[InverseFactor] = []  # one, shared by all that `with_gradients` makes of this

    def add(self, inputs: Tensor, *, weights: Tensor | None = None, sequences: int | None = None) -> None:
        """Inputs of whole sequences [n, S, I], any dtype, and how much each token counts [n, S]; None: each once.

        Where an expert has only some of their tokens, these [T, I], and the number of `sequences`.
        """
        self.sequences += inputs.shape[0] if sequences is None else sequences
        x_TI = inputs.flatten(0, -2).float()
        weighted_TI = weigh(x_TI, weights)
        self.tokens += x_TI.shape[0] if weights is None else weights.sum()
        if self._sums is not None:
            self._sums += weighted_TI.sum(0, dtype=self._sums.dtype)
        if self._squares is not None:
            self._squares += (weighted_TI.to(self._squares.dtype) * x_TI).sum(0)
        if self._products is not None:
            add_products(self._products, weighted_TI, x_TI)

    def combine(self, processes: Processes, *, rank: int | None = None) -> None:
        """Add up what all processes saw, in place.

        Args:
            processes: all of which call this.
            rank: the only one that has the result, where not all need it; on the others it is of no use.
        """
        if processes.size == 1:
            return
        add = processes.sum if rank is None else partial(processes.sum_on, rank=rank)
        counts = torch.stack([self.tokens, torch.full_like(self.tokens, self.sequences)])
        for part in (counts, self._sums, self._squares, self._products):
            if part is not None:
                add(part)
        if rank in (None, processes.rank):
            self.tokens, self.sequences = counts[0], int(counts[1])

    def absorb(self, others: InputStatistics) -> None:
        """Add what others have of other tokens, in place; both collect the same."""
        self.sequences += others.sequences
        self.tokens = self.tokens + others.tokens
        parts = ((self._sums, others._sums), (self._squares, others._squares), (self._products, others._products))
        for own, theirs in parts:
            if own is not None:
                assert theirs is not None
                own += theirs

    @property
    def squares(self) -> Tensor:
        """Mean over sequences of the sum over tokens of x_j² [I]: `scaler_row` of the code released with Wanda."""
        assert self._squares is not None
        return (self._squares / self.sequences).to(self._dtype)

    @property
    def mean(self) -> Tensor:
        """Mean over tokens of x_j [I], each token by its weight."""
        assert self._sums is not None
        return (self._sums / self.tokens).to(self._dtype)

    @property
    def variance(self) -> Tensor:
        """Mean over tokens of (x_j - mean)² [I], each token by its weight; needs sums and squares."""
        assert self._squares is not None
        assert self._sums is not None
        of_squares = self._squares / self.tokens - (self._sums / self.tokens).square()
        return of_squares.clamp_min(0.0).to(self._dtype)

    @property
    def products(self) -> Tensor:
        """Sum over tokens of w x xᵀ [I, I]."""
        assert self._products is not None
        return self._products

    @property
    def moment(self) -> Tensor:
        """H: mean over sequences of 2 XᵀX [I, I], twice the Hessian of half the squared error of one output."""
        return self.products * (2 / self.sequences)

    @property
    def token_moment(self) -> Tensor:
        """C: mean over tokens of x xᵀ [I, I], each token by its weight."""
        return self.products / self.tokens

    def assume_alike_if_none(self) -> None:
        """An expert that no token of the text was sent to: as if its inputs were alike, so that its weights decide."""
        if self.tokens > 0:
            return
        self.tokens += 1
        if self._squares is not None:
            self._squares += 1
        if self._products is not None:
            self._products.diagonal().add_(1)

    def is_finite(self) -> bool:
        """Whether every input that was seen was finite."""
        parts = (self._sums, self._squares, self._products)
        return all(bool(part.isfinite().all()) for part in parts if part is not None)

    @property
    def damping(self) -> float | None:
        """Of the factor that was computed; None where nobody has asked for one."""
        return self._factor[0].damping if self._factor else None

    def with_gradients(self, gradients: Tensor, *, length: int) -> InputStatistics:
        """The same of its inputs, for a matrix with these gradients [O, I] of sequences of so many tokens."""
        of_matrix = copy(self)
        of_matrix.gradients, of_matrix.length = gradients, length
        return of_matrix

    def factor(self) -> InverseFactor:
        """Factor of the inverse of the damped H; computed once for all matrices that read these inputs.

        Raises:
            ShearingError: H is singular even when damped strongly.
        """
        if not self._factor:
            self._factor.append(InverseFactor.of(self.moment, damping=self._damping))
        return self._factor[0]


def weigh(x_TI: Tensor, weights: Tensor | None) -> Tensor:
    """Each token times its weight; weights of any shape with T entries."""
    return x_TI if weights is None else x_TI * weights.flatten()[:, None]


def add_products(total: Tensor, x_TI: Tensor, y_TO: Tensor) -> None:
    """Adds xᵀ y to `total` [I, O], in place; products in the precision of x and y, the sum in its own."""
    if total.dtype == x_TI.dtype:
        total.addmm_(x_TI.T, y_TO)
    else:
        total += x_TI.T @ y_TO
