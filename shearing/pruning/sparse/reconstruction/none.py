"""No reconstruction: the weights that stay are left as they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shearing.pruning.calibration.statistics import Need
from shearing.pruning.sparse.reconstruction.facts import RECONSTRUCTIONS
from shearing.pruning.sparse.reconstruction.reconstruction import Choice


@dataclass(frozen=True)
class NoReconstruction:
    """Sets what goes to zero."""

    name: str = "none"
    needs: frozenset[Need] = RECONSTRUCTIONS["none"].needs
    by_columns: bool = False
    rows_apart: bool = True

    def prune(self, weight: Tensor, *, choice: Choice) -> tuple[Tensor, Tensor]:
        """See `Reconstruction`."""
        mask = choice.mask(weight)
        return weight.float().masked_fill(~mask, 0.0), mask
