"""Alpha: units with heavier-tailed spectra are kept more (AlphaPruning, arXiv 2410.10912)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shearing.errors import ShearingError
from shearing.progress import activity
from shearing.pruning.sparse.allocation.allocator import Allocation, Request
from shearing.pruning.sparse.allocation.wanted import allocate_wanted

BINS = 100


@dataclass(frozen=True)
class Alpha:
    """Sparsities proportional to a linear map of the power-law exponent of each unit's spectra; reads no text.

    The exponent of a unit is the mean of `hill_exponent` over its matrices. The map takes the lowest exponent, of the
    heaviest tail, to 1 - ε and the highest to 1 + ε; all are then multiplied by one factor, so that their mean, weighed
    by parameters, is the sparsity asked for (section 3.2 of the paper).

    Attributes:
        epsilon: ε, below 1. Coarse levels mix only if the sparsities then differ by about a step.
    """

    epsilon: float = 0.3

    def allocate(self, request: Request) -> Allocation:
        """See `Allocator`; scores are exponents."""
        exponents: dict[str, float] = {}
        with activity("spectra of the dense model", total=len(request.matrices), console=request.console) as advance:
            for matrix in request.matrices:
                weight = request.source.read([matrix.name])[matrix.name]
                try:
                    exponents[matrix.name] = hill_exponent(weight.to(request.compute.device))
                except ValueError as error:
                    raise ShearingError(
                        f"model (parameter {matrix.name})",
                        value=str(error),
                        allowed="a spectrum with a tail, from which AlphaPruning takes an exponent",
                        mend="exclude that matrix, or choose another allocation",
                    ) from error
                advance(1)
        units = request.units
        means = [sum(exponents[matrix.name] for matrix in unit.matrices) / len(unit.matrices) for unit in units]
        factors = _between(means, 1 - self.epsilon, 1 + self.epsilon)
        mean = sum(unit.size * factor for unit, factor in zip(units, factors, strict=True)) / sum(
            unit.size for unit in units
        )
        sparsity = float(1 - request.budget)
        return allocate_wanted(request, scores=means, wanted=[1 - sparsity * factor / mean for factor in factors])


def hill_exponent(weight: Tensor) -> float:
    """Exponent of the power law that the tail of a matrix's spectrum follows, by Hill's estimator.

    α = 1 + n / (Σ log λ_i - n log λ_min), over the n largest squared singular values λ_i, the lowest of them λ_min
    (`PL_Alpha_Hill` in section 3.1 of arXiv 2410.10912). The tail begins at the peak of the histogram of log λ, the
    lowest of the fullest among 100 bins of equal width: λ_min is the lowest λ in it.

    Args:
        weight: [O, I], any dtype.

    Raises:
        ValueError: the spectrum has no tail, as that of zeros or of an orthogonal matrix.
    """
    wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.T.double()
    # In fp64 the Gram matrix loses no more than singular values in fp32 do, and takes a third of their time.
    squared = torch.linalg.eigvalsh(wide @ wide.T).cpu()
    logs = squared[squared > torch.finfo(torch.float64).eps * max(weight.shape) * squared.max()].log()
    if logs.numel() == 0 or not float(logs.max() - logs.min()) > 0:
        raise ValueError("a spectrum without a tail: all singular values are alike, or 0")
    counts = torch.histc(logs, bins=BINS, min=float(logs.min()), max=float(logs.max()))
    fullest = int((counts == counts.max()).nonzero()[0])
    edge = logs.min() + fullest * (logs.max() - logs.min()) / BINS
    tail = logs[logs >= edge]
    excess = float((tail - tail.min()).sum())
    if not excess > 0:
        raise ValueError("a spectrum without a tail: its largest singular values are alike")
    return float(1 + tail.numel() / excess)


def _between(values: Sequence[float], low: float, high: float) -> list[float]:
    """Values mapped linearly so that the lowest becomes `low` and the highest `high`; all the same: the middle."""
    lowest, highest = min(values), max(values)
    if lowest == highest:
        return [(low + high) / 2] * len(values)
    return [low + (high - low) * (value - lowest) / (highest - lowest) for value in values]
