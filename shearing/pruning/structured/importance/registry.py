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


EVERYTHING = frozenset({"layers", "attention", "mlp", "kv_groups", "query_heads", "intermediate", "hidden"})
"""All that `Scores` may hold."""


@dataclass(frozen=True, kw_only=True)
class MetricFacts:
    """What is to be known of a metric before it is imported.

    Attributes:
        home: `module:class`.
        title: what tables call a choice of units by it.
        reads_text: whether it needs calibration text.
        source: where its formula stands, as `arXiv 2407.14679`; empty for what needs no source.
        reconstructed: its exact rule is not public, and this is our reading of it: no figure of it is the paper's.
        gives: what it scores. One that scores less than `EVERYTHING` grades no start and is no baseline of a run; a
            race takes the rest of another metric and says so.
        across_layers: how its scores of heads and units compare across layers, in a few words; empty: only inside a
            row. Those that compare are raced in their own form too (`rounding.select_across_layers`), which no
            ordinary config holds, so it is evaluated and not trained.
    """

    home: str
    title: str
    reads_text: bool
    source: str = ""
    reconstructed: bool = False
    gives: frozenset[str] = EVERYTHING
    across_layers: str = ""


_HERE = "shearing.pruning.structured.importance"

METRICS: dict[str, MetricFacts] = {
    "random": MetricFacts(home=f"{_HERE}.chance:Chance", title="chance", reads_text=False),
    "magnitude": MetricFacts(home=f"{_HERE}.magnitude:Magnitude", title="weight magnitude", reads_text=False),
    "activations": MetricFacts(
        home=f"{_HERE}.activations:Activations",
        title="activations",
        reads_text=True,
        source="arXiv 2407.14679",
    ),
    "reconstruction": MetricFacts(
        home=f"{_HERE}.reconstruction:Reconstruction",
        title="reconstruction",
        reads_text=True,
        source="arXiv 2302.04089",
    ),
}


def metric_of(name: str) -> Metric:
    """The metric of a name in `METRICS`."""
    metric: Metric = resolve_name(METRICS[name].home)()
    return metric


def complete_metrics() -> tuple[str, ...]:
    """Those that score everything: each may grade a start, and be a baseline of a run."""
    return tuple(name for name, facts in METRICS.items() if facts.gives == EVERYTHING)
