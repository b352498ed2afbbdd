"""Several weights at once: the least squares of each row over what it keeps (arXiv 2410.15567).

Removing the set P from a row costs ½ w_P ([H⁻¹]_PP)⁻¹ w_Pᵀ, and the others make up for it by
δw = -w_P ([H⁻¹]_PP)⁻¹ [H⁻¹]_P: ; one weight is Optimal Brain Surgeon. It is the same as refitting the kept set K, which
is what is computed: w_K = w H_:K (H_KK)⁻¹, the optimum for the mask. Every row has a system of its own.

Legend: O outputs, I inputs, R rows solved together, K inputs that the fullest of them keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.sparse.reconstruction.facts import RECONSTRUCTIONS
from shearing.pruning.sparse.reconstruction.reconstruction import Choice

CHUNK_ELEMENTS = 1 << 25
"""Of the systems that are solved together: R K² numbers, 128 MB."""


@dataclass(frozen=True)
class ClosedForm:
    """The criterion's mask is fixed, and the kept weights become the best there are for it.

    H is damped as for `obs`. The cost grows with the cube of what a row keeps, row by row: made for GPUs, or models of
    a few hundred million parameters.
    """

    name: str = "closed_form"
    needs: frozenset[Need] = RECONSTRUCTIONS["closed_form"].needs
    by_columns: bool = False
    rows_apart: bool = True

    def prune(self, weight: Tensor, *, choice: Choice) -> tuple[Tensor, Tensor]:
        """See `Reconstruction`."""
        assert choice.statistics is not None
        mask = choice.mask(weight)
        moment_II, dead_I = damped_moment(choice.statistics)
        weight = weight.float().masked_fill(dead_I, 0.0)
        wanted_OI = weight @ moment_II
        found = torch.zeros_like(weight)
        # Rows that keep as many lie together, so that few systems are larger than they have to be.
        order_O = mask.sum(1).argsort(stable=True)
        largest = max(1, int(mask.sum(1).max()))
        for rows_R in order_O.split(max(1, CHUNK_ELEMENTS // largest**2)):
            found[rows_R] = _refitted(wanted_OI[rows_R], mask[rows_R], moment_II=moment_II)
        return found, mask


def damped_moment(statistics: InputStatistics) -> tuple[Tensor, Tensor]:
    """H [I, I], damped as for its inverse's factor, and which inputs are always zero [I]."""
    factor, moment_II = statistics.factor(), statistics.moment
    moment_II.diagonal().copy_(factor.diagonal)
    return moment_II, factor.dead


def _refitted(wanted_RI: Tensor, mask_RI: Tensor, *, moment_II: Tensor) -> Tensor:
    """Weights [R, I] that are w H_:K (H_KK)⁻¹ on what each row keeps, and 0 elsewhere."""
    count = int(mask_RI.sum(1).max())
    kept_RK = mask_RI.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    filled_RK = mask_RI.gather(1, kept_RK)
    system_RKK = moment_II[kept_RK[:, :, None], kept_RK[:, None, :]]
    # Rows that keep less have equations of their own for the rest: 1 x = 0.
    system_RKK.masked_fill_(~(filled_RK[:, :, None] & filled_RK[:, None, :]), 0.0)
    system_RKK.diagonal(dim1=1, dim2=2).masked_fill_(~filled_RK, 1.0)
    right_RK1 = (wanted_RI.gather(1, kept_RK) * filled_RK)[:, :, None]
    found_RK = torch.cholesky_solve(right_RK1, torch.linalg.cholesky(system_RKK))[:, :, 0]
    return torch.zeros_like(wanted_RI).scatter_(1, kept_RK, found_RK * filled_RK)
