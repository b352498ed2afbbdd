"""Inverses of second moments: damped until there is a Cholesky factor.

Legend: I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shearing.errors import ShearingError

LARGEST_DAMPING = 1.0

_FLOOR = 1e-8
"""Share of the mean of the diagonal that inputs which are always zero get where each is damped by its own share."""


@dataclass(frozen=True)
class InverseFactor:
    """Upper triangular U with H^-1 = U^T U.

    U_jj² is the j-th diagonal entry of the inverse of H without its first j - 1 rows and columns: what eliminating
    input j costs once those before it are fixed (arXiv 2301.00774, section 3.3).

    Attributes:
        upper: U [I, I].
        diagonal: [I], of the damped H itself.
        dead: [I] bool, inputs that were always zero.
        damping: share of the mean diagonal of H that was added to its diagonal.
    """

    upper: Tensor
    diagonal: Tensor
    dead: Tensor
    damping: float

    def inverse_diagonal(self, *, in_order: bool) -> Tensor:
        """[H^-1]_jj [I]; in order: of H without its first j - 1 rows and columns, which is U_jj²."""
        return self.upper.diagonal().square() if in_order else self.upper.square().sum(0)

    @classmethod
    def of(cls, moment: Tensor, *, damping: float) -> InverseFactor:
        """Factor of the inverse of a second moment.

        Args:
            moment: H [I, I]; its diagonal is damped in place, as a copy of it might not fit beside it.
            damping: see `damped_factors`.

        Raises:
            ShearingError: H is singular even when damped strongly.
        """
        diagonal = moment.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1.0
        for lower, used in damped_factors(moment, damping=damping, of="mean"):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return cls(upper, diagonal.clone(), dead, used)
        raise AssertionError("damped_factors ends by raising")


def damped_factors(moment: Tensor, *, damping: float, of: Literal["mean", "each"]) -> Iterator[tuple[Tensor, float]]:
    """Lower Cholesky factors [I, I] of a damped second moment, and the damping of each: as asked for, then stronger.

    Damping is raised tenfold as long as rounding leaves no factor, and for as long as the next factor is asked for.

    Args:
        moment: symmetric [I, I]; its diagonal is damped in place.
        damping: share that is added to the diagonal.
        of: mean: of the mean of the diagonal (SparseGPT, arXiv 2301.00774); each: of each entry itself, so that inputs
            of any size are damped alike.

    Raises:
        ShearingError: singular even when damped strongly.
    """
    diagonal = moment.diagonal()
    own, mean = diagonal.clone(), float(diagonal.mean())
    added: Tensor | float = 0.0
    largest = max(LARGEST_DAMPING, damping)
    while damping <= largest:
        wanted: Tensor | float
        if of == "mean":
            wanted = damping * mean
        else:
            # An input that is always zero has no part in anything, and must not make the matrix singular.
            wanted = damping * own + _FLOOR * own.mean() + torch.finfo(torch.float32).tiny
        diagonal += wanted - added
        added = wanted
        lower, failed = torch.linalg.cholesky_ex(moment)
        if not int(failed):
            yield lower, damping
        damping *= 10
    raise ShearingError(
        "damping",
        value=f"{damping / 10:g}",
        allowed="a second moment of the inputs that can be inverted when damped",
        mend="give more calibration text (samples, seqlen), or check the model for enormous activations",
    )
