"""What an update rule is: a pure function of what was seen and of what it remembers.

Vectors are float64 [domains], in one order for all of them; NaN stands for what is not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one update goes by.

    Attributes:
        weights: current weights, not negative, summing to 1.
        losses: mean loss of each domain in nats; NaN: not seen.
        reference: loss of each domain that is aimed at, in nats; NaN: none.
    """

    weights: Vector
    losses: Vector
    reference: Vector


class Rule(Protocol):
    """One way to turn losses into weights; an instance holds the constants, the caller what is remembered."""

    def update(self, seen: Seen, *, memory: Vector) -> tuple[Vector, Vector]:
        """New weights, summing to 1, and what to remember.

        Args:
            seen: weights and losses now.
            memory: what the update before left, one number a domain; all NaN at the first update.
        """
        ...

    def largest(self, prior: Vector) -> Vector:
        """The largest weight that any losses can give each domain, however many updates there are.

        Args:
            prior: weights before the first update.
        """
        ...


def without_memory(weights: Vector, seen: Seen) -> tuple[Vector, Vector]:
    """What `Rule.update` returns of a rule that remembers nothing."""
    return weights, np.full(len(seen.weights), np.nan)


def excess(losses: Vector, reference: Vector) -> Vector:
    """Loss above the reference; 0 where either is not known."""
    with np.errstate(invalid="ignore"):
        difference = losses - reference
    return np.where(np.isfinite(losses) & np.isfinite(reference), difference, 0.0)


def smooth(weights: Vector, *, smoothing: float) -> Vector:
    """w_i <- (1 - c) w_i + c / k, normalised (DoReMi, arXiv 2305.10429, Algorithm 1)."""
    blended = (1.0 - smoothing) * weights + smoothing / len(weights)
    normalised: Vector = blended / blended.sum()
    return normalised


def softmax(logits: Vector, *, alive: npt.NDArray[np.bool_]) -> Vector:
    """Softmax that leaves every alive domain above 0, however large the differences."""
    powers = np.exp(logits - logits.max())
    powers[alive] = np.maximum(powers[alive], np.finfo(np.float64).tiny)
    normalised: Vector = powers / powers.sum()
    return normalised
