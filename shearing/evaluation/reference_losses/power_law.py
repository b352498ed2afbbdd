"""Loss against size: L(N) = a N^-b + c, fitted to models of several sizes, and what it predicts at another size.

For a given exponent the best a and c are a linear least-squares problem, so only the exponent is searched (variable
projection): on a grid, and then for the zero of the derivative between the neighbours of the best point of the grid, by
bisection. There are no start values, and three points, which three constants can pass through, are met to rounding.

A physical fit has a > 0, b > 0 and c >= 0: a loss falls with size, towards an entropy that is not negative. Where the
least squares would have c < 0, c = 0 is the best that is allowed, for the sum of squares is convex in c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shearing.errors import ShearingError

CONSTANTS = 3
EXPONENTS = np.geomspace(1e-4, 4.0, 600)
_BISECTIONS = 60

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """L(N) = scale (N / unit)^-exponent + offset, in nats; N counts parameters, embeddings included.

    Attributes:
        unit: geometric mean of the sizes fitted to, which keeps `scale` of the size of a loss.
    """

    scale: float
    exponent: float
    offset: float
    unit: float

    def at(self, parameters: float) -> float:
        """Loss at a size."""
        return float(self.scale * (parameters / self.unit) ** -self.exponent + self.offset)

    @property
    def a(self) -> float:
        """The factor of N^-b, N in parameters."""
        return float(self.scale * self.unit**self.exponent)


def fit_power_law(parameters: Sequence[float], *, losses: Sequence[float], bounded: bool = True) -> PowerLaw:
    """The law with the least sum of squares.

    Args:
        parameters: sizes, at least three different ones, embeddings included.
        losses: of the same models, in nats.
        bounded: c >= 0; without it c is free, as in the published fits.

    Raises:
        ShearingError: fewer sizes than constants, or losses that do not fall with size.
    """
    sizes, values = np.array(parameters, dtype=np.float64), np.array(losses, dtype=np.float64)
    if len(set(sizes.tolist())) < CONSTANTS:
        raise ShearingError(
            "sizes in the loss table",
            value=len(set(sizes.tolist())),
            allowed=f"at least {CONSTANTS} different ones, as a N^-b + c has {CONSTANTS} constants",
            mend="measure more models of the family",
        )
    unit = float(np.exp(np.log(sizes).mean()))
    log_sizes = np.log(sizes / unit)

    def solve(exponents: Vector) -> tuple[Vector, Vector, Vector, Vector]:
        """Scale, offset, sum of squares, and half its derivative by the exponent, at each of some exponents."""
        powers = np.exp(-exponents[:, None] * log_sizes)
        # The columns 1 and powers are nearly parallel for small exponents: slopes from differences to the mean.
        centred = powers - powers.mean(-1, keepdims=True)
        scale = centred @ values / (centred * centred).sum(-1)
        offset = values.mean() - scale * powers.mean(-1)
        if bounded:
            alone = powers @ values / (powers * powers).sum(-1)
            scale, offset = np.where(offset < 0, alone, scale), np.maximum(offset, 0.0)
        rest = values - scale[:, None] * powers - offset[:, None]
        return scale, offset, (rest * rest).sum(-1), scale * (rest * powers * log_sizes).sum(-1)

    best = int(solve(EXPONENTS)[2].argmin())
    low, high = EXPONENTS[max(0, best - 1)], EXPONENTS[min(len(EXPONENTS) - 1, best + 1)]
    falls = solve(low[None])[3] < 0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if (solve(middle[None])[3] < 0) == falls:
            low = middle
        else:
            high = middle
    # No zero in between where the best exponent is an end of the grid.
    candidates = np.array([low, high, EXPONENTS[best]])
    scales, offsets, squares, _ = solve(candidates)
    chosen = int(squares.argmin())
    scale, offset, exponent = float(scales[chosen]), float(offsets[chosen]), float(candidates[chosen])
    if scale <= 0:
        raise ShearingError(
            "losses in the loss table",
            value=dict(sorted(zip(sizes.astype(int).tolist(), values.tolist(), strict=True))),
            allowed="losses that fall as the size grows",
            mend="leave out the models that do not belong to the family",
        )
    return PowerLaw(scale=scale, exponent=exponent, offset=offset, unit=unit)


def leave_one_out(parameters: Sequence[float], *, losses: Sequence[float], bounded: bool = True) -> list[float] | None:
    """Error (predicted less measured, in nats) at each model of a law fitted to the others; None for too few sizes.

    For the smallest and the largest model this is an error of extrapolation.
    """
    if len(set(parameters)) <= CONSTANTS:
        return None
    errors = []
    for left_out, (size, loss) in enumerate(zip(parameters, losses, strict=True)):
        others = [i for i in range(len(losses)) if i != left_out]
        law = fit_power_law([parameters[i] for i in others], losses=[losses[i] for i in others], bounded=bounded)
        errors.append(law.at(size) - loss)
    return errors
