"""Reference losses predicted while training goes on, from loss against size and tokens.

DRPruning (arXiv 2411.14055) fits a law to the losses of the run itself and aims at what it predicts for the end. Here
the law is a sum of the two terms that scaling laws have (Hoffmann et al., arXiv 2203.15556, equation 10):

    L(N, T) = E + A (N / N_end)^-alpha + B (T / T_end)^-beta,  E, A, B >= 0,  alpha, beta from a grid

so the prediction for the end, N_end parameters and T_end tokens, is E + A + B. Both variables are counted in units of
the end: the prediction then is a combination of numbers of the size of a loss, whatever the exponents. With the
exponents given it is a least-squares problem in three numbers that may not be negative, solved exactly by trying every
subset of them; of equally good fits the one with fewer terms and smaller exponents is taken. Where the size does not
change, its term is left out: nothing can be learned about it.

Everything is a function of the observations alone: no start values, no chance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MINIMUM_OBSERVATIONS = 6
"""One more than the law has constants, so that a prediction is never an interpolation."""

MAXIMUM_OBSERVATIONS = 64
"""The newest that are kept; the first ones after a change say least about the end."""

# Simple ones first: of equally good fits the first one stays.
_TERMS = (
    ("offset",),
    ("training",),
    ("size",),
    ("offset", "training"),
    ("offset", "size"),
    ("size", "training"),
    ("offset", "size", "training"),
)
EXPONENTS = tuple(round(0.1 * i, 1) for i in range(1, 16))
# A smaller sum of squares by less than this share is rounding; so is a smaller change of size.
_GAIN = 1e-6

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Held-out losses at one moment.

    Attributes:
        parameters: expected size of the model, embeddings included.
        tokens: trained on since the stage began.
        losses: loss of each domain, in nats; a domain that was not seen is absent.
    """

    parameters: float
    tokens: int
    losses: Mapping[str, float]

    def to_json(self) -> dict[str, object]:
        """JSON-able; `from_json` gives back an equal one."""
        return {"parameters": self.parameters, "tokens": self.tokens, "losses": dict(self.losses)}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Observation:
        """What `to_json` gave."""
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class OnlineLaw:
    """L(N, T) = offset + size (N / N_end)^-alpha + training (T / T_end)^-beta, in nats."""

    offset: float
    size: float
    alpha: float
    training: float
    beta: float

    @property
    def at_end(self) -> float:
        """Loss at the end's size after the end's tokens."""
        return self.offset + self.size + self.training


def predict_end(
    observations: Sequence[Observation], *, domains: Iterable[str], parameters: int, tokens: int
) -> dict[str, float]:
    """Loss of each domain at the end of the stage, for the domains with enough observations; all finite.

    Args:
        observations: of the stage so far, in order.
        domains: the domains of the run.
        parameters: size of the model at the end, embeddings included.
        tokens: of the whole stage.
    """
    predicted = {}
    for name in domains:
        # Checkpoints of earlier versions may hold losses that are not finite.
        seen = [each for each in observations if math.isfinite(each.losses.get(name, math.nan))]
        if len(seen) >= MINIMUM_OBSERVATIONS:
            law = fit_online(
                np.array([each.parameters for each in seen]) / parameters,
                tokens=np.array([each.tokens for each in seen]) / tokens,
                losses=np.array([each.losses[name] for each in seen]),
            )
            if math.isfinite(law.at_end):
                predicted[name] = law.at_end
    return predicted


def fit_online(sizes: Vector, *, tokens: Vector, losses: Vector) -> OnlineLaw:
    """The law with the least sum of squares.

    Args:
        sizes: N / N_end of each observation, positive; [observations].
        tokens: T / T_end of each, positive.
        losses: in nats.
    """
    changes = bool(np.ptp(sizes) > _GAIN * sizes.max())
    best, least = OnlineLaw(offset=float(losses.mean()), size=0.0, alpha=0.0, training=0.0, beta=0.0), math.inf
    for terms in _TERMS:
        if "size" in terms and not changes:
            continue
        alphas = EXPONENTS if "size" in terms else (0.0,)
        betas = EXPONENTS if "training" in terms else (0.0,)
        exponents = np.array(list(itertools.product(alphas, betas)))
        columns = {
            "offset": np.ones((len(exponents), len(losses))),
            "size": sizes ** -exponents[:, :1],
            "training": tokens ** -exponents[:, 1:],
        }
        weights, squares = _least_squares(np.stack([columns[term] for term in terms], axis=-1), losses=losses)
        first = int(squares.argmin())
        if squares[first] < least * (1.0 - _GAIN):
            least = float(squares[first])
            found = dict(zip(terms, weights[first].tolist(), strict=True))
            alpha, beta = exponents[first].tolist()
            best = OnlineLaw(**{"offset": 0.0, "size": 0.0, "training": 0.0, **found}, alpha=alpha, beta=beta)
    return best


def _least_squares(matrices: Vector, *, losses: Vector) -> tuple[Vector, Vector]:
    """Least-squares solutions [grid, terms] of matrices [grid, observations, terms] and their sums of squares [grid].

    The sum is infinite where a solution is negative or not unique.
    """
    # Columns of one length: a steep power of a small share is a large number.
    lengths = np.sqrt((matrices * matrices).sum(1))
    orthogonal, triangular = np.linalg.qr(matrices / lengths[:, None, :])
    diagonal = np.abs(np.diagonal(triangular, axis1=1, axis2=2))
    unique = (diagonal > 1e-10).all(-1)
    triangular[~unique] = np.eye(triangular.shape[-1])
    projected = np.einsum("got,o->gt", orthogonal, losses)
    weights = np.linalg.solve(triangular, projected[..., None])[..., 0] / lengths
    rest = losses - np.einsum("got,gt->go", matrices, weights)
    fits = unique & (weights >= 0).all(-1)
    return weights, np.where(fits, (rest * rest).sum(-1), np.inf)
