"""What calibration text says about the inputs of a linear layer: squares, second moment, inverse of the latter.

Legend: n sequences, S tokens each, I inputs. All in fp32, as running means over sequences, whatever activations are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shearing.errors import ShearingError

Need = Literal["squares", "moment"]

LARGEST_DAMPING = 1.0


@dataclass(frozen=True)
class InverseFactor:
    """Upper triangular U with H^-1 = U^T U.

    U_jj² is the j-th diagonal entry of the inverse of H without its first j - 1 rows and columns: what eliminating
    input j costs once those before it are fixed (arXiv 2301.00774, section 3.3).

    Attributes:
        upper: U [I, I].
        dead: [I] bool, inputs that were always zero.
        damping: share of the mean diagonal of H that was added to its diagonal.
    """

    upper: Tensor
    dead: Tensor
    damping: float


class InputStatistics:
    """Statistics of the inputs that one or more linear layers read.

    Args:
        columns: I.
        needs: which of them are collected.
        device: where.
        damping: see `InverseFactor`; raised tenfold as long as rounding leaves H without a Cholesky factor.
    """

    def __init__(self, columns: int, *, needs: frozenset[Need], device: torch.device, damping: float = 0.01) -> None:
        self.sequences = 0
        self._damping = damping
        self._squares = torch.zeros(columns, device=device) if "squares" in needs else None
        self._moment = torch.zeros(columns, columns, device=device) if "moment" in needs else None
        self._factor: InverseFactor | None = None

    def add(self, inputs: Tensor) -> None:
        """Inputs of whole sequences [n, S, I], any dtype."""
        before, self.sequences = self.sequences, self.sequences + inputs.shape[0]
        x = inputs.flatten(0, -2).float()
        if self._squares is not None:
            self._squares.mul_(before / self.sequences).add_(x.square().sum(0), alpha=1 / self.sequences)
        if self._moment is not None:
            self._moment.mul_(before / self.sequences).addmm_(x.T, x, alpha=2 / self.sequences)

    @property
    def squares(self) -> Tensor:
        """Mean over sequences of the sum over tokens of x_j² [I]: `scaler_row` of the code released with Wanda."""
        assert self._squares is not None
        return self._squares

    @property
    def moment(self) -> Tensor:
        """H: mean over sequences of 2 XᵀX [I, I], twice the Hessian of half the squared error of one output."""
        assert self._moment is not None
        return self._moment

    def is_finite(self) -> bool:
        """Whether every input that was seen was finite."""
        return all(bool(part.isfinite().all()) for part in (self._squares, self._moment) if part is not None)

    def factor(self) -> InverseFactor:
        """Factor of the inverse of the damped H; computed once for all matrices that read these inputs.

        Raises:
            ShearingError: H is singular even when damped strongly.
        """
        if self._factor is None:
            self._factor = _inverse_factor(self.moment, damping=self._damping)
        return self._factor


def _inverse_factor(moment: Tensor, *, damping: float) -> InverseFactor:
    H = moment.clone()
    diagonal = H.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    mean = float(diagonal.mean())
    added = 0.0
    while damping <= LARGEST_DAMPING:
        diagonal += damping * mean - added
        added = damping * mean
        lower, failed = torch.linalg.cholesky_ex(H)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return InverseFactor(upper, dead, damping)
        damping *= 10
    raise ShearingError(
        "damping",
        value=f"{damping / 10:g}",
        allowed="a second moment of the inputs that can be inverted when damped",
        mend="give more calibration text (samples, seqlen), or check the model for enormous activations",
    )
