"""Distributionally robust weights: the worst mix within a bounded divergence of the prior one.

DRPruning (arXiv 2411.14055) weights domains by the answer of an adversary who may shift the mix, but only so far, and
never takes all of a domain away; its published constants are rho 0.05, floor 0.2 and 0.1 for the running losses. Here
the adversary's problem is solved exactly:

    maximise sum_i q_i D_i  subject to  1/2 sum_i p_i (q_i / p_i - 1)^2 <= rho,  q_i >= f p_i,  sum_i q_i = 1

with prior p, floor f and D the running loss above the reference; or, where each update brings a reference of its own
text, the running mean of what its losses are above it (`DynamicMixture`). Only differences of D matter, and only their
ratios: adding to all of D, or scaling it, changes nothing. So these weights do not pile up from one update to the next
as the exponential rules' do: they are a function of running means, and stay near the prior however long training lasts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shearing.data.mixture.rules.rule import Seen, Vector, excess

# Variance of gains, whose spread is 1, below which they are the same.
_TIED = 1e-200


@dataclass(frozen=True, kw_only=True)
class Robust:
    """Weights of the worst mix near the prior.

    Attributes:
        prior: weights before the first update, positive, summing to 1.
        divergence: rho, largest divergence from the prior.
        floor: f, least share of its prior weight that a domain keeps.
        loss_ema: share of the newest loss in the running loss.
    """

    prior: Vector
    divergence: float
    floor: float
    loss_ema: float

    def update(self, seen: Seen, *, memory: Vector) -> tuple[Vector, Vector]:
        """See `Rule.update`; remembers the running loss of each domain, which begins as the first loss seen."""
        known = np.isfinite(seen.losses)
        running = np.where(
            np.isfinite(memory), (1.0 - self.loss_ema) * memory + self.loss_ema * seen.losses, seen.losses
        )
        running = np.where(known, running, memory)
        return self._worst(excess(running, seen.reference), prior=self.prior), running

    def largest(self, prior: Vector) -> Vector:
        """The weight of a domain that alone is above its reference; the losses cannot ask for more."""
        alone = np.eye(len(prior))
        return np.array([self._worst(one, prior=prior)[i] for i, one in enumerate(alone)])

    def _worst(self, gains: Vector, *, prior: Vector) -> Vector:
        return worst_mix(gains, prior=prior, divergence=self.divergence, floor=self.floor)


def worst_mix(gains: Vector, *, prior: Vector, divergence: float, floor: float) -> Vector:
    """The mix that maximises sum_i q_i gains_i within a chi-square ball around the prior, above a floor; exact.

    With r_i = q_i / p_i the optimum is r_i = max(floor, 1 + t (gains_i - mu)), mu such that the mix sums to 1. As t
    grows from 0 the divergence grows and domains reach the floor one by one, those with the least gain first; between
    two such moments the divergence is a quadratic in t. The walk over these pieces ends where it meets the bound, or
    where all domains that are left gain the same.

    Args:
        gains: finite, float64 [domains].
        prior: not negative, summing to 1; a domain of weight 0 gets 0.
        divergence: rho >= 0, bound of 1/2 sum_i p_i (r_i - 1)^2.
        floor: in [0, 1].

    Returns:
        float64 [domains], summing to 1.
    """
    order = np.argsort(gains, kind="stable")
    order = order[prior[order] > 0]
    p, e = prior[order], gains[order]
    # Neither changes the answer; together they keep squares of very large and very small differences finite.
    e = e - e.max()
    spread = -e.min()
    e = e / spread if spread > 0 else e
    ratios = np.full(len(p), floor)
    for first in range(len(p)):
        mass, free_p, free_e = p[:first].sum(), p[first:], e[first:]
        free_mass = free_p.sum()
        level = (1.0 - floor * mass) / free_mass
        centred = free_e - (free_p @ free_e) / free_mass
        variance = free_p @ (centred * centred)
        if variance < _TIED:
            ratios[first:] = level
            break
        used = mass * (1.0 - floor) ** 2 + free_mass * (level - 1.0) ** 2
        step = math.sqrt(max(0.0, 2.0 * divergence - used) / variance)
        if level + step * centred[0] >= floor:
            ratios[first:] = level + step * centred
            break
    mix = np.zeros(len(prior))
    mix[order] = np.maximum(ratios, floor) * p
    normalised: Vector = mix / mix.sum()
    return normalised
