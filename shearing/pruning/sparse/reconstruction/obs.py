"""Optimal Brain Surgeon, column by column: SparseGPT's updates (arXiv 2301.00774, algorithm 1).

Columns are visited left to right. What a removed weight did is spread over the columns to its right, by the factor U of
the inverse second moment of the inputs: w_k -= (w_j / U_jj) U_jk. Inside a block of columns that happens at once, for
the columns after the block in one product when the block is done.

Legend: O outputs, I inputs, b columns of a block. Weights are transposed inside, so that a column is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shearing.pruning.calibration.inverse import InverseFactor
from shearing.pruning.calibration.statistics import Need
from shearing.pruning.sparse.reconstruction.facts import RECONSTRUCTIONS
from shearing.pruning.sparse.reconstruction.reconstruction import Choice

BLOCK_COLUMNS = 128


@dataclass(frozen=True)
class OptimalBrainSurgeon:
    """The kept weights make up for the removed ones.

    A criterion that follows compensation chooses N:M groups at their first column, and unstructured masks block by
    block; any other chooses once, on the dense weights.
    """

    name: str = "obs"
    needs: frozenset[Need] = RECONSTRUCTIONS["obs"].needs
    by_columns: bool = True
    rows_apart: bool = True

    def prune(self, weight: Tensor, *, choice: Choice) -> tuple[Tensor, Tensor]:
        """See `Reconstruction`."""
        assert choice.statistics is not None
        factor = choice.statistics.factor()
        follows = choice.criterion.follows_compensation
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device) if follows else choice.mask(weight)
        weight_IO = weight.float().T.contiguous()
        weight_IO[factor.dead] = 0.0
        at_once = choice.pattern.columns_at_once if follows else None
        step = BLOCK_COLUMNS if at_once is None else max(BLOCK_COLUMNS // at_once, 1) * at_once
        for start in range(0, weight.shape[1], step):
            block = slice(start, min(start + step, weight.shape[1]))
            if follows and at_once is None:
                mask[:, block] = choice.mask(weight_IO[block].T, first=start, in_order=True)
            errors_bO = _compensate_block(weight_IO, block, mask=mask, factor=factor, choice=choice, group=at_once)
            weight_IO[block.stop :].addmm_(factor.upper[block, block.stop :].T, errors_bO, alpha=-1)
        return weight_IO.T.contiguous(), mask


def _compensate_block(
    weight_IO: Tensor, block: slice, *, mask: Tensor, factor: InverseFactor, choice: Choice, group: int | None
) -> Tensor:
    """Prunes the columns of a block and compensates inside it, in place.

    Returns:
        [b, O]: of each column, what went, over U_jj.
    """
    columns_bO, upper_bb = weight_IO[block], factor.upper[block, block]
    errors_bO = torch.zeros_like(columns_bO)
    diagonal = upper_bb.diagonal().tolist()
    for j in range(columns_bO.shape[0]):
        column = block.start + j
        if group is not None and column % group == 0:
            mask[:, column : column + group] = choice.mask(columns_bO[j : j + group].T, first=column, in_order=True)
        torch.mul(columns_bO[j], ~mask[:, column], out=errors_bO[j])
        columns_bO[j] -= errors_bO[j]
        errors_bO[j] /= diagonal[j]
        columns_bO[j + 1 :].addr_(upper_bb[j, j + 1 :], errors_bO[j], alpha=-1)
    return errors_bO
