"""DSnoT, dynamic sparse no training (arXiv 2310.08915): a mask is moved until each output keeps its mean.

Weights stay as they are. What an output loses on average is e = Σ over removed weights of W_ij E[x_j]; weights are
brought back and others let go, one pair at a time, so that e approaches 0.

Legend: R rows of a part of the matrix, I inputs, G groups of M inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.sparse.reconstruction.facts import RECONSTRUCTIONS
from shearing.pruning.sparse.reconstruction.reconstruction import Choice

CYCLES, CYCLES_OF = 50, 4096
"""Pairs that a row exchanges at most: the published 50, of rows with 4,096 inputs; narrower ones in proportion.

A narrow row that exchanges 50 loses more than the mean it wins back: see docs/sparsity.md.
"""

THRESHOLD = 0.1
"""|e| at which a row is left alone, of sums over the tokens of a sequence, as in the released code."""

ROWS = 4096
"""Rows of a part: what is compared of them is a few times as large as they are."""


@dataclass(frozen=True)
class DynamicSparseNoTraining:
    """The mask is refined; any criterion says where it starts.

    As in the paper, what is let go has the lowest Wanda score among kept weights whose removal also pulls e towards 0.
    Ours: the variance of an input is that over all tokens; a weight changes once at most; a row stops where no pair
    helps; of all masks that a row has had, the one of least |e| is taken, so that none ends worse than it began; and
    narrow rows exchange fewer pairs.
    Under N:M a pair is of one group, so that the pattern holds; unstructured, of one row.
    """

    name: str = "dsnot"
    needs: frozenset[Need] = RECONSTRUCTIONS["dsnot"].needs
    by_columns: bool = False
    rows_apart: bool = True

    def prune(self, weight: Tensor, *, choice: Choice) -> tuple[Tensor, Tensor]:
        """See `Reconstruction`."""
        assert choice.statistics is not None
        weight, mask = weight.float(), choice.mask(weight)
        parts = zip(weight.split(ROWS), mask.split(ROWS), strict=True)
        group = choice.pattern.columns_at_once
        mask = torch.cat([_refined(of, kept, statistics=choice.statistics, group=group) for of, kept in parts])
        return weight.masked_fill(~mask, 0.0), mask


def cycles_of(columns: int) -> int:
    """How many pairs a row of so many inputs exchanges at most."""
    return min(CYCLES, -(-CYCLES * columns // CYCLES_OF))


def _refined(weight_RI: Tensor, mask_RI: Tensor, *, statistics: InputStatistics, group: int | None) -> Tensor:
    """The mask [R, I] that leaves the mean of each row's output nearest to what it was, of those tried."""
    effect_RI = weight_RI * statistics.mean.float()
    # An input that never varies is all mean: it comes back first.
    variance_I = statistics.variance.float().clamp_min(torch.finfo(torch.float32).tiny)
    gain_RI = effect_RI / variance_I
    score_RI = weight_RI.abs() * statistics.squares.sqrt()
    threshold = THRESHOLD * statistics.sequences / float(statistics.tokens)
    mask_RI = mask_RI.clone()
    rows, free_RI = torch.arange(len(mask_RI), device=mask_RI.device), torch.ones_like(mask_RI)
    error_R = effect_RI.masked_fill(mask_RI, 0.0).sum(1)
    best_RI, least_R = mask_RI.clone(), error_R.abs()
    open_R = least_R > threshold
    for _ in range(cycles_of(mask_RI.shape[1])):
        sign_R1 = error_R.sign()[:, None]
        may_go_RI = mask_RI & free_RI & (effect_RI * sign_R1 < 0)
        may_come_RI = ~mask_RI & free_RI & (effect_RI * sign_R1 > 0)
        if group is not None:
            may_come_RI &= may_go_RI.unflatten(1, (-1, group)).any(2).repeat_interleave(group, 1)
        coming_R = (gain_RI * sign_R1).masked_fill(~may_come_RI, -torch.inf).argmax(1)
        if group is not None:
            groups_I = torch.arange(mask_RI.shape[1], device=mask_RI.device) // group
            may_go_RI &= groups_I == (coming_R // group)[:, None]
        going_R = score_RI.masked_fill(~may_go_RI, torch.inf).argmin(1)
        open_R &= may_come_RI[rows, coming_R] & may_go_RI[rows, going_R]
        moved = open_R.nonzero().flatten()
        if not len(moved):
            break
        coming, going = coming_R[moved], going_R[moved]
        mask_RI[moved, coming], mask_RI[moved, going] = True, False
        free_RI[moved, coming] = free_RI[moved, going] = False
        error_R[moved] += effect_RI[moved, going] - effect_RI[moved, coming]
        better_R = error_R.abs() < least_R
        best_RI[better_R] = mask_RI[better_R]
        least_R = torch.minimum(least_R, error_R.abs())
        open_R &= error_R.abs() > threshold
    return best_RI
