"""ALPS: which weights stay is searched together with their values, under a growing penalty (arXiv 2406.07831).

With inputs scaled to norm 1 and A = XᵀX damped, B the weights, D the sparse ones, V the dual variable:

    B = (A + ρ)⁻¹ (A W - V + ρ D),   D = the pattern's projection of B + V / ρ,   V += ρ (B - D)

ρ grows as long as D's support changes, and faster the more it does; then conjugate gradients refit what is kept. One
eigendecomposition serves every ρ. Legend: O outputs, I inputs; weights are [O, I], so products come from the right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shearing.pruning.calibration.statistics import Need
from shearing.pruning.sparse.reconstruction.admm import scaled_products
from shearing.pruning.sparse.reconstruction.facts import RECONSTRUCTIONS
from shearing.pruning.sparse.reconstruction.reconstruction import Choice, keep

DAMPING = 0.01
PENALTY = 0.1
"""ρ at the beginning, where A has a diagonal of 1."""

GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""By what ρ is multiplied where more than that share of the support changed."""

ITERATIONS = 300
CHECK_EVERY = 3
RESTARTS = 5
"""How often ρ begins anew, a fifth as large, where the support never changed."""

GRADIENT_STEPS = 10
TOLERANCE = 1e-4
"""Of conjugate gradients: steps, and the residual over the right side at which a row is done."""


@dataclass(frozen=True)
class Alps:
    """The criterion says where the search for the mask begins; weights that stay are refitted.

    Sizes of weights are compared where inputs have norm 1, as Wanda does, whatever the criterion.
    """

    name: str = "alps"
    needs: frozenset[Need] = RECONSTRUCTIONS["alps"].needs
    by_columns: bool = False
    rows_apart: bool = False

    def prune(self, weight: Tensor, *, choice: Choice) -> tuple[Tensor, Tensor]:
        """See `Reconstruction`."""
        assert choice.statistics is not None
        normal_II, norms_I = scaled_products(choice.statistics)
        diagonal = normal_II.diagonal()
        diagonal += DAMPING * diagonal.mean()
        # An input that is always zero has no norm to compare with: its weights are worth nothing.
        dense_OI = (weight.float() * norms_I).masked_fill_(choice.statistics.products.diagonal() == 0, 0.0)
        wanted_OI = dense_OI @ normal_II
        sparse_OI, mask = _search(
            dense_OI, choice.mask(weight), wanted_OI=wanted_OI, normal_II=normal_II, choice=choice
        )
        return refit_by_gradients(sparse_OI, mask, wanted_OI=wanted_OI, normal_II=normal_II) / norms_I, mask


def _search(
    dense_OI: Tensor, mask: Tensor, *, wanted_OI: Tensor, normal_II: Tensor, choice: Choice
) -> tuple[Tensor, Tensor]:
    """Sparse weights [O, I] and their support, from the first of it."""
    values_I, vectors_II = (part.float() for part in torch.linalg.eigh(normal_II.double()))
    penalty, grown, restarts = PENALTY, False, 0
    first = mask
    d_OI, v_OI, before = dense_OI * mask, torch.zeros_like(dense_OI), mask
    for iteration in range(1, ITERATIONS + 1):
        right_OI = wanted_OI - v_OI + penalty * d_OI
        b_OI = (right_OI @ vectors_II / (values_I + penalty)) @ vectors_II.T
        d_OI = b_OI + v_OI / penalty
        mask = keep(d_OI.abs(), pattern=choice.pattern, gone=choice.gone)
        d_OI = d_OI * mask
        v_OI = v_OI + penalty * (b_OI - d_OI)
        if iteration % CHECK_EVERY:
            continue
        changed = int((mask != before).sum()) / max(1, int(mask.sum()))
        before = mask
        factor = next((factor for share, factor in GROWTH if changed > share), None)
        if factor is not None:
            penalty, grown = penalty * factor, True
        elif grown or restarts == RESTARTS:
            break
        else:
            penalty, restarts = penalty / 5, restarts + 1
            d_OI, v_OI, before = dense_OI * first, torch.zeros_like(dense_OI), first
    return d_OI, mask


def refit_by_gradients(start_OI: Tensor, mask: Tensor, *, wanted_OI: Tensor, normal_II: Tensor) -> Tensor:
    """Conjugate gradients for min ‖x A - wanted‖ in the norm of A⁻¹ over what the mask keeps, row by row.

    Args:
        start_OI: weights to begin with, 0 where the mask is false.
        mask: [O, I], true where kept.
        wanted_OI: W A.
        normal_II: A, positive definite.
    """
    x_OI = start_OI.clone()
    residual_OI = (wanted_OI - x_OI @ normal_II) * mask
    direction_OI = residual_OI.clone()
    size_O1 = residual_OI.square().sum(1, keepdim=True)
    enough_O1 = (wanted_OI * mask).square().sum(1, keepdim=True) * TOLERANCE**2
    for _ in range(GRADIENT_STEPS):
        open_O1 = size_O1 > enough_O1
        if not bool(open_O1.any()):
            break
        through_OI = (direction_OI @ normal_II) * mask
        curvature_O1 = (direction_OI * through_OI).sum(1, keepdim=True)
        step_O1 = torch.where(open_O1, size_O1 / curvature_O1.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        x_OI += step_O1 * direction_OI
        residual_OI -= step_O1 * through_OI
        size_after_O1 = residual_OI.square().sum(1, keepdim=True)
        turn_O1 = size_after_O1 / size_O1.clamp_min(torch.finfo(torch.float32).tiny)
        direction_OI = residual_OI + turn_O1 * direction_OI
        size_O1 = size_after_O1
    return x_OI
