"""OWL: units with more outliers among their Wanda scores are kept more (arXiv 2310.05175)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from shearing.progress import activity
from shearing.pruning.calibration.dense_layers import DenseLayer, dense_layers, dense_units
from shearing.pruning.sparse.allocation.allocator import Allocation, Request
from shearing.pruning.sparse.allocation.wanted import allocate_wanted, around_budget
from shearing.pruning.sparse.criteria.wanda import Wanda
from shearing.pruning.sparse.patterns import Pattern

PUBLISHED_SPREAD = 0.08


@dataclass(frozen=True)
class Owl:
    """Densities that follow the share of outliers in each unit, on the dense model.

    D = share of a unit's scores |W_ij| ‖X_j‖ above `outlier_ratio` times their mean; r = 2 λ (D - min) / (max - min);
    density = r - mean(r) + (1 - S), the mean weighed by parameters.

    Attributes:
        outlier_ratio: M; 5 in the published commands.
        spread: λ, half the range of densities. None: 0.08, as published, or the step between neighbouring levels where
            that is more. The published mode for N:M, where the example is of 8, lets the number kept differ by 2,
            which is a λ of one step; with 0.08, nearly all units would have the same N:8.
    """

    outlier_ratio: float = 5.0
    spread: float | None = None

    def allocate(self, request: Request) -> Allocation:
        """See `Allocator`; scores are shares of outliers."""
        wanda = Wanda()
        units = request.units
        of_layer = {layer: [unit for unit in units if unit.layer == layer] for layer in {unit.layer for unit in units}}
        scores: dict[str, float] = {}
        total = dense_units(
            request.matrices, needs=wanda.needs, calibration=request.calibration, compute=request.compute
        )
        with activity("outliers of the dense model", total=total, console=request.console) as advance:
            for dense in dense_layers(
                request.source,
                matrices=request.matrices,
                needs=wanda.needs,
                damping=request.damping,
                calibration=request.calibration,
                compute=request.compute,
                advance=advance,
            ):
                for unit in of_layer[dense.layer]:
                    names = [matrix.name for matrix in unit.matrices]
                    scores[unit.name] = outlier_share(
                        dense, names, criterion=wanda, ratio=self.outlier_ratio, device=request.compute.device
                    )
        shares = [scores[unit.name] for unit in units]
        spread = _spread(request.levels) if self.spread is None else self.spread
        lowest, highest = min(shares), max(shares)
        above = [2 * spread * (share - lowest) / (highest - lowest) if highest > lowest else 0.0 for share in shares]
        wanted = around_budget(above, units=units, budget=request.budget)
        return allocate_wanted(request, scores=shares, wanted=wanted)


def outlier_share(
    dense: DenseLayer, names: Sequence[str], *, criterion: Wanda, ratio: float, device: torch.device
) -> float:
    """Share of the scores of some matrices of a layer that are above `ratio` times the mean of all of them."""

    def scores(name: str) -> Tensor:
        return criterion.scores(dense.weights[name].to(device), statistics=dense.statistics[name])

    # Scores are computed twice rather than kept: those of a block are as large as the block in fp32.
    size = sum(dense.weights[name].numel() for name in names)
    threshold = ratio * torch.stack([scores(name).sum(dtype=torch.float64) for name in names]).sum() / size
    above = torch.stack([(scores(name) > threshold).sum() for name in names]).sum()
    return int(above) / size


def _spread(levels: Sequence[Pattern]) -> float:
    densities = sorted(float(level.density) for level in levels)
    steps = [denser - sparser for sparser, denser in pairwise(densities)]
    return max(PUBLISHED_SPREAD, min(steps, default=0.0))
