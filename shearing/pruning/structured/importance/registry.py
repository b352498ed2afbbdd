"""The importance metrics by name: what each is called where, and where it is defined. Imports no torch.

A metric is one file with one class that does what `Metric` says, and one line here; recipes, baselines and benchmarks
take their names from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shearing.pruning.structured.importance.metric import Metric


EVERYTHING = frozenset({"layers", "attention", "mlp", "kv_groups", "query_heads", "intermediate", "experts", "hidden"})
"""All that `Scores` may hold; experts where a model has some."""

_LAYERS = frozenset({"layers"})
_SUBLAYERS = frozenset({"attention", "mlp"})


@dataclass(frozen=True, kw_only=True)
class MetricFacts:
    """What is to be known of a metric before it is imported.

    Attributes:
        home: `module:class`.
        title: what tables call a choice of units by it.
        reads_text: whether it needs calibration text.
        source: where its formula stands, as `arXiv 2407.14679`; empty for what needs no source.
        reconstructed: its exact rule is not public, and this is our reading of it: no figure of it is the paper's.
        arguments: of the class, where one class has several names.
        gives: what it scores. One that scores less than `EVERYTHING` grades no start and is no baseline of a run; a
            race takes the rest of another metric and says so.
        across_layers: how its scores of heads and units compare across layers, in a few words; empty: only inside a
            row. Those that compare are raced in their own form too (`rounding.select_across_layers`), which no
            ordinary config holds, so it is evaluated and not trained.
        folds_means: whether its method gives every write a bias that holds the mean of what goes (`fold_means`): part
            of its own form, without a refit.
    """

    home: str
    title: str
    reads_text: bool
    source: str = ""
    reconstructed: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    gives: frozenset[str] = EVERYTHING
    across_layers: str = ""
    folds_means: bool = False


_HEADS_AND_UNITS = frozenset({"kv_groups", "query_heads", "intermediate"})

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
    "taylor": MetricFacts(
        home=f"{_HERE}.gradients.taylor:FirstOrder",
        title="Taylor, first order",
        reads_text=True,
        source="arXiv 2305.11627",
        across_layers="change of the loss, heads and units compared as they are",
    ),
    "taylor_second": MetricFacts(
        home=f"{_HERE}.gradients.taylor:SecondOrder",
        title="Taylor, second order",
        reads_text=True,
        source="arXiv 2305.11627",
        across_layers="change of the loss, heads and units compared as they are",
    ),
    "taylor_vector": MetricFacts(
        home=f"{_HERE}.gradients.taylor:VectorOrder",
        title="Taylor, by vectors",
        reads_text=True,
        source="arXiv 2305.11627",
        across_layers="change of the loss, heads and units compared as they are",
    ),
    "taylor_distillation": MetricFacts(
        home=f"{_HERE}.gradients.taylor:Distillation",
        title="Taylor of the distance to the source",
        reads_text=True,
        across_layers="change of the distance, heads and units compared as they are",
    ),
    "fluctuation": MetricFacts(
        home=f"{_HERE}.inputs.fluctuation:Fluctuation",
        title="fluctuation",
        reads_text=True,
        source="arXiv 2312.11983",
        gives=_HEADS_AND_UNITS,
        across_layers="standard deviations from the mean of a layer (AL-AM)",
        folds_means=True,
    ),
    "wanda": MetricFacts(
        home=f"{_HERE}.inputs.wanda:StructuredWanda",
        title="Wanda over structures",
        reads_text=True,
        source="arXiv 2312.11983",
        gives=_HEADS_AND_UNITS,
    ),
    "structural": MetricFacts(
        home=f"{_HERE}.gradients.structural:Structural",
        title="structural importance",
        reads_text=True,
        source="arXiv 2412.15127",
        reconstructed=True,
        gives=_HEADS_AND_UNITS,
        across_layers="importance over its mean, less where a layer's share fluctuates",
    ),
    "block_influence": MetricFacts(
        home=f"{_HERE}.depth.block_influence:BlockInfluence",
        title="block influence",
        reads_text=True,
        source="arXiv 2403.03853",
        gives=_LAYERS | _SUBLAYERS,
    ),
    "layer_taylor": MetricFacts(
        home=f"{_HERE}.depth.taylor:LayerTaylor",
        title="Taylor of layers",
        reads_text=True,
        source="arXiv 2402.02834",
        gives=_LAYERS | _SUBLAYERS,
    ),
    "layer_taylor_protected": MetricFacts(
        home=f"{_HERE}.depth.taylor:LayerTaylor",
        title="Taylor of layers, ends protected",
        reads_text=True,
        source="arXiv 2402.02834",
        arguments={"protect": True},
        gives=_LAYERS,
    ),
    "leave_one_out": MetricFacts(
        home=f"{_HERE}.depth.leave_one_out:LeaveOneOut",
        title="loss without a layer",
        reads_text=True,
        source="arXiv 2402.02834",
        gives=_LAYERS,
    ),
    "leave_one_out_sublayers": MetricFacts(
        home=f"{_HERE}.depth.leave_one_out:LeaveOneOut",
        title="loss without a sub-layer",
        reads_text=True,
        source="arXiv 2407.16286",
        arguments={"parts": "sublayers"},
        gives=_SUBLAYERS,
    ),
    "leave_one_out_greedy": MetricFacts(
        home=f"{_HERE}.depth.leave_one_out:GreedyLeaveOneOut",
        title="loss without a layer, one after the other",
        reads_text=True,
        gives=_LAYERS,
    ),
    "shapley": MetricFacts(
        home=f"{_HERE}.depth.shapley:ShapleyLike",
        title="Shapley-like, loss",
        reads_text=True,
        source="arXiv 2407.16286",
        gives=_LAYERS,
    ),
    "shapley_logits": MetricFacts(
        home=f"{_HERE}.depth.shapley:ShapleyLike",
        title="Shapley-like, logits",
        reads_text=True,
        source="arXiv 2407.16286",
        arguments={"harm": "logits"},
        gives=_LAYERS,
    ),
    "shapley_sublayers": MetricFacts(
        home=f"{_HERE}.depth.shapley:ShapleyLike",
        title="Shapley-like of sub-layers, loss",
        reads_text=True,
        source="arXiv 2407.16286",
        arguments={"parts": "sublayers"},
        gives=_SUBLAYERS,
    ),
    "policy_gradient": MetricFacts(
        home=f"{_HERE}.learned.policy_gradient:PolicyGradient",
        title="policy gradient",
        reads_text=True,
        source="arXiv 2406.10576",
    ),
    "hard_budget": MetricFacts(
        home=f"{_HERE}.learned.hard_budget:HardBudget",
        title="hard budget",
        reads_text=True,
        source="GRASPrune, ACL 2026",
    ),
    "hard_budget_graded": MetricFacts(
        home=f"{_HERE}.learned.hard_budget:HardBudget",
        title="hard budget, from activations",
        reads_text=True,
        source="GRASPrune, ACL 2026",
        arguments={"graded": True},
    ),
}


def metric_of(name: str) -> Metric:
    """The metric of a name in `METRICS`."""
    metric: Metric = resolve_name(METRICS[name].home)(**METRICS[name].arguments)
    return metric


def complete_metrics() -> tuple[str, ...]:
    """Those that score everything: each may grade a start, and be a baseline of a run."""
    return tuple(name for name, facts in METRICS.items() if facts.gives == EVERYTHING)
