"""Importance by fluctuation: what hardly varies over tokens can be replaced by its mean."""

from __future__ import annotations

from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics
from shearing.pruning.structured.importance.inputs.write_inputs import WriteInputMetric


class Fluctuation(WriteInputMetric):
    """Weighted fluctuation of FLAP (arXiv 2312.11983, WIFV), standardised in every layer; see `Metric`.

    For the input j of a write W: Var(x_j) Σ_i W_ij² over the tokens of the text; squared for the attention. Then
    (value - mean) / standard deviation over the inputs of the layer, so that layers, and heads and units, compare; a
    head's score is the mean over its channels, a group's over its heads.

    The released code's running estimate leaves the first window out; this is the variance itself.
    """

    def __init__(self) -> None:
        super().__init__(needs=frozenset({"sums", "squares"}))

    def of_inputs(self, weight: Tensor, statistics: InputStatistics, *, kind: str) -> Tensor:
        """See `Fluctuation`."""
        values = statistics.variance * weight.square().sum(0)
        return standardised(values.square() if kind == "attention" else values)


def standardised(values: Tensor) -> Tensor:
    """Values minus their mean, in standard deviations; 0 where all are the same."""
    deviations = values - values.mean()
    spread = deviations.square().mean().sqrt()
    return deviations.where(spread > 0, 0.0) / spread.where(spread > 0, 1.0)
