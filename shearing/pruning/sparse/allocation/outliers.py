"""Outliers among a criterion's scores, on the dense model: what OWL and the allocation by redundancy go by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shearing.progress import activity
from shearing.pruning.calibration.dense_layers import DenseLayer, dense_layers, dense_units
from shearing.pruning.sparse.allocation.allocator import Request
from shearing.pruning.sparse.criteria.criterion import Criterion


def outlier_shares(request: Request, *, criterion: Criterion, ratio: float) -> list[float]:
    """Of each unit, the share of its scores that are above `ratio` times their mean; one pass over the text.

    Raises:
        ShearingError: the model computes NaN or infinity.
    """
    units = request.units
    of_layer = {layer: [unit for unit in units if unit.layer == layer] for layer in {unit.layer for unit in units}}
    shares: dict[str, float] = {}
    total = dense_units(
        request.matrices, needs=criterion.needs, calibration=request.calibration, compute=request.compute
    )
    with activity("outliers of the dense model", total=total, console=request.console) as advance:
        for dense in dense_layers(
            request.source,
            matrices=request.matrices,
            needs=criterion.needs,
            damping=request.damping,
            calibration=request.calibration,
            compute=request.compute,
            advance=advance,
        ):
            for unit in of_layer[dense.layer]:
                names = [matrix.name for matrix in unit.matrices]
                shares[unit.name] = _share(
                    dense, names, criterion=criterion, ratio=ratio, device=request.compute.device
                )
    return [shares[unit.name] for unit in units]


def _share(
    dense: DenseLayer, names: Sequence[str], *, criterion: Criterion, ratio: float, device: torch.device
) -> float:
    """Share of the scores of some matrices of a layer that are above `ratio` times the mean of all of them."""

    def scores(name: str) -> Tensor:
        return criterion.scores(dense.weights[name].to(device), statistics=dense.statistics[name])

    # Scores are computed twice rather than kept: those of a block are as large as the block in fp32.
    size = sum(dense.weights[name].numel() for name in names)
    threshold = ratio * torch.stack([scores(name).sum(dtype=torch.float64) for name in names]).sum() / size
    above = torch.stack([(scores(name) > threshold).sum() for name in names]).sum()
    return int(above) / size
