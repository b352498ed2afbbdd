"""The importance metrics by name: what each is called where, and where it is defined. Imports no torch.

A metric is one file with one class that does what `Metric` says, and one line here; recipes, baselines and benchmarks
take their names from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shearing.pruning.structured.importance.metric import Metric


@dataclass(frozen=True, kw_only=True)
class MetricFacts:
    """What is to be known of a metric before it is imported.

    Attributes:
        home: `module:class`.
        reads_text: whether it needs calibration text.
        start: what `prune.initial_masks` calls it; None: it grades no start.
        baseline: what `evaluation.baselines` calls it; None: it is no baseline.
    """

    home: str
    reads_text: bool
    start: str | None = None
    baseline: str | None = None


METRICS: dict[str, MetricFacts] = {
    "random": MetricFacts(
        home="shearing.pruning.structured.importance.chance:Chance", reads_text=False, baseline="random"
    ),
    "magnitude": MetricFacts(
        home="shearing.pruning.structured.importance.magnitude:Magnitude", reads_text=False, baseline="magnitude"
    ),
    "activations": MetricFacts(
        home="shearing.pruning.structured.importance.activations:Activations",
        reads_text=True,
        start="activations",
        baseline="importance",
    ),
    "reconstruction": MetricFacts(
        home="shearing.pruning.structured.importance.reconstruction:Reconstruction",
        reads_text=True,
        start="reconstruction",
    ),
}


def metric_of(name: str) -> Metric:
    """The metric of a name in `METRICS`."""
    metric: Metric = resolve_name(METRICS[name].home)()
    return metric


def starts() -> dict[str, str]:
    """Value of `prune.initial_masks` -> metric, for those that grade a start."""
    return {facts.start: name for name, facts in METRICS.items() if facts.start is not None}


def baselines() -> dict[str, str]:
    """Value of `evaluation.baselines` -> metric."""
    return {facts.baseline: name for name, facts in METRICS.items() if facts.baseline is not None}
