"""RIA, relative importance and activations (ICLR 2024, "Plug-and-Play: An Efficient Post-training Pruning Method")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.sparse.criteria.facts import CRITERIA


@dataclass(frozen=True)
class RelativeImportance:
    """The weight's share of its output's weights plus its share of its input's, times the root of the input's norm.

    A weight that is small among all may be most of what an input has: no input and no output loses everything. As
    published, all weights of a matrix are compared.
    """

    name: str = "ria"
    needs: frozenset[Need] = CRITERIA["ria"].needs
    follows_compensation: bool = False

    def scores(
        self, weight: Tensor, *, statistics: InputStatistics | None, first: int = 0, in_order: bool = False
    ) -> Tensor:
        """(|W_ij| / Σ_k |W_ik| + |W_ij| / Σ_k |W_kj|) ‖X_j‖^½; sums over the whole matrix."""
        del in_order
        assert statistics is not None
        assert first == 0
        size = weight.float().abs()
        tiny = torch.finfo(torch.float32).tiny
        relative = size / size.sum(1, keepdim=True).clamp_min(tiny) + size / size.sum(0, keepdim=True).clamp_min(tiny)
        return relative * statistics.squares.sqrt().sqrt()
