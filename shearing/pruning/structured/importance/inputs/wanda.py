"""Importance by Wanda's score, summed over a structure."""

from __future__ import annotations

from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics
from shearing.pruning.structured.importance.inputs.write_inputs import WriteInputMetric


class StructuredWanda(WriteInputMetric):
    """Wanda-sp (the baseline of FLAP, arXiv 2312.11983; Wanda is arXiv 2306.11695); see `Metric`.

    For the input j of a write W: mean over outputs i of |W_ij| ‖x_j‖, ‖x_j‖ the L2 norm over the tokens of the text; a
    head's score is the mean over its channels, a group's over its heads. Means instead of sums: structures of a kind
    are of one size.
    """

    def __init__(self) -> None:
        super().__init__(needs=frozenset({"squares"}))

    def of_inputs(self, weight: Tensor, statistics: InputStatistics, *, kind: str) -> Tensor:
        """See `StructuredWanda`."""
        del kind
        return weight.abs().mean(0) * statistics.squares.sqrt()
