"""ADMM: kept weights are refitted to the layer's output by alternating directions (arXiv 2401.02938).

Inputs are scaled to norm 1, which makes the size of a weight its Wanda score. Then, with A = XᵀX damped, Y = W:

    Z = (Y + U) ⊙ mask,   U += Y - Z,   Y = (A + ρ)⁻¹ (A W + ρ (Z - U))

One inverse does for all iterations and all outputs. Legend: O outputs, I inputs; weights are [O, I], so products come
from the right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.sparse.reconstruction.facts import RECONSTRUCTIONS
from shearing.pruning.sparse.reconstruction.reconstruction import Choice

ITERATIONS = 20
MASK_ITERATIONS = 15
"""Those at whose beginning a gradual mask is chosen anew."""

PENALTY = 1.0
"""ρ, where A has a diagonal of 1."""

DAMPING = 0.1
"""Share of its mean diagonal that is added to A, on both sides of the equation."""


@dataclass(frozen=True)
class Admm:
    """The criterion's mask is fixed, and the kept weights make up for the others.

    Constants are the published ones. What `damping` says is for criteria: A has a damping of its own.
    """

    name: str = "admm"
    needs: frozenset[Need] = RECONSTRUCTIONS["admm"].needs
    by_columns: bool = False
    rows_apart: bool = True

    def prune(self, weight: Tensor, *, choice: Choice) -> tuple[Tensor, Tensor]:
        """See `Reconstruction`."""
        assert choice.statistics is not None
        return _solve(weight, choice=choice, gradual=False)


@dataclass(frozen=True)
class GradualAdmm:
    """The mask is chosen anew in the first iterations, of weights as they are by then, and grows to its target.

    The criterion scores Y + U: with `wanda` this is the published rule. Of what the pattern would remove, each row
    loses at iteration t the share 1 - (1 - (t + 1) / 15)³ of lowest scores. (The released code does that for groups
    of a row; its default removes everything at once.)
    """

    name: str = "admm_gradual"
    needs: frozenset[Need] = RECONSTRUCTIONS["admm_gradual"].needs
    by_columns: bool = False
    rows_apart: bool = True

    def prune(self, weight: Tensor, *, choice: Choice) -> tuple[Tensor, Tensor]:
        """See `Reconstruction`."""
        return _solve(weight, choice=choice, gradual=True)


def _solve(weight: Tensor, *, choice: Choice, gradual: bool) -> tuple[Tensor, Tensor]:
    assert choice.statistics is not None
    normal_II, norms_I = scaled_products(choice.statistics)
    diagonal = normal_II.diagonal()
    diagonal += DAMPING * diagonal.mean()
    mask = choice.mask(weight)
    y_OI = weight.float() * norms_I
    wanted_OI = y_OI @ normal_II
    diagonal += PENALTY
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(normal_II))
    u_OI = torch.zeros_like(y_OI)
    for iteration in range(ITERATIONS):
        sum_OI = y_OI + u_OI
        if gradual and iteration < MASK_ITERATIONS:
            mask = _mask_at(iteration, sum_OI / norms_I, choice=choice)
        z_OI = sum_OI * mask
        u_OI = sum_OI - z_OI
        y_OI = (wanted_OI + PENALTY * (z_OI - u_OI)) @ inverse_II
    return (y_OI + u_OI).masked_fill_(~mask, 0.0) / norms_I, mask


def scaled_products(statistics: InputStatistics) -> tuple[Tensor, Tensor]:
    """XᵀX of inputs scaled to norm 1 [I, I], a copy, and their norms [I]; inputs always zero are not scaled."""
    norms_I = statistics.products.diagonal().sqrt()
    norms_I[norms_I == 0] = 1.0
    return statistics.products / norms_I / norms_I[:, None], norms_I


def _mask_at(iteration: int, weight: Tensor, *, choice: Choice) -> Tensor:
    """The mask of an iteration: as the pattern wants it, and beside that what goes later."""
    kept = choice.mask(weight)
    share = 1 - (1 - (iteration + 1) / MASK_ITERATIONS) ** 3
    if iteration + 1 == MASK_ITERATIONS:
        return kept
    scores = choice.criterion.scores(weight, statistics=choice.statistics).masked_fill(kept, torch.inf)
    count_O1 = ((~kept).sum(1, keepdim=True) * share).long()
    ascending = scores.sort(dim=1).values
    # The first score that stays; where nothing was to go, it is infinite or the row's lowest.
    later = scores >= ascending.gather(1, count_O1.clamp_max(ascending.shape[1] - 1))
    return later if choice.gone is None else later & ~choice.gone
