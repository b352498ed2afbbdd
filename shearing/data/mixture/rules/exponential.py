"""What the multiplicative rules share: weights grow by the exponential of the excess loss and are smoothed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shearing.mixture.rules.rule import Seen, Vector, smooth, softmax


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """Constants of a rule that exponentiates.

    Attributes:
        step_size: eta, multiplies the excess loss in the exponent.
        smoothing: c, share of the uniform mix blended into the result.
    """

    step_size: float = 1.0
    smoothing: float = 1e-4

    def multiplied(self, weights: Vector, *, by: Vector) -> Vector:
        """w_i exp(eta x_i), normalised and smoothed; a weight of 0 stays 0 but for smoothing."""
        with np.errstate(divide="ignore"):
            logits = np.log(weights) + self.step_size * by
        return smooth(softmax(logits, alive=weights > 0), smoothing=self.smoothing)

    def largest(self, prior: Vector) -> Vector:
        """All but what smoothing leaves to the others."""
        return np.full(len(prior), 1.0 - self.smoothing + self.smoothing / len(prior))


def without_memory(weights: Vector, seen: Seen) -> tuple[Vector, Vector]:
    """The result of a rule that remembers nothing."""
    return weights, np.full(len(seen.weights), np.nan)
