"""Rules that exponentiate the excess loss and smooth the result: the paper's, its published code's, and the bandit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shearing.data.mixture.rules.rule import Seen, Vector, excess, smooth, softmax, without_memory


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """Constants of a rule that exponentiates.

    Attributes:
        step_size: eta, multiplies the excess loss in the exponent.
        smoothing: c, share of the uniform mix blended into the result.
    """

    step_size: float
    smoothing: float

    def multiplied(self, weights: Vector, *, by: Vector) -> Vector:
        """w_i exp(eta x_i), normalised and smoothed; a weight of 0 stays 0 but for smoothing."""
        with np.errstate(divide="ignore"):
            logits = np.log(weights) + self.step_size * by
        return smooth(softmax(logits, alive=weights > 0), smoothing=self.smoothing)

    def largest(self, prior: Vector) -> Vector:
        """All but what smoothing leaves to the others."""
        return np.full(len(prior), 1.0 - self.smoothing + self.smoothing / len(prior))


@dataclass(frozen=True, kw_only=True)
class Paper(Exponential):
    """w_i proportional to w_i exp(eta max(loss_i - reference_i, 0)): Sheared LLaMA, arXiv 2310.06694, Algorithm 1.

    Only loss above the reference counts.
    """

    def update(self, seen: Seen, *, memory: Vector) -> tuple[Vector, Vector]:  # noqa: ARG002 - remembers nothing
        """See `Rule.update`."""
        above = np.maximum(excess(seen.losses, seen.reference), 0.0)
        return without_memory(self.multiplied(seen.weights, by=above), seen)


@dataclass(frozen=True, kw_only=True)
class Released(Exponential):
    """w = softmax(log w + eta (loss - reference)), not clipped: the code that was published with Sheared LLaMA.

    Loss below the reference counts too.
    """

    def update(self, seen: Seen, *, memory: Vector) -> tuple[Vector, Vector]:  # noqa: ARG002 - remembers nothing
        """See `Rule.update`."""
        return without_memory(self.multiplied(seen.weights, by=excess(seen.losses, seen.reference)), seen)


@dataclass(frozen=True, kw_only=True)
class Bandit(Exponential):
    """w = softmax(w + eta (loss - reference)); a weight of 0 comes back.

    In Sheared LLaMA's published code, and not in its paper: weights are added to, not multiplied.
    """

    def update(self, seen: Seen, *, memory: Vector) -> tuple[Vector, Vector]:  # noqa: ARG002 - remembers nothing
        """See `Rule.update`."""
        logits = seen.weights + self.step_size * excess(seen.losses, seen.reference)
        chosen = softmax(logits, alive=np.ones(len(logits), dtype=bool))
        return without_memory(smooth(chosen, smoothing=self.smoothing), seen)
