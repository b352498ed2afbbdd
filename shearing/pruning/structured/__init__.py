"""Units that go: masks over layers, heads, MLP units and hidden dimensions, and what learns them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.pruning.structured.constraint import Constraint
    from shearing.pruning.structured.granularities import Granularity, granularities_of
    from shearing.pruning.structured.importance.inputs.mean_bias import MeanBias, fold_means, with_biases
    from shearing.pruning.structured.importance.metric import Evidence, Metric, Scores
    from shearing.pruning.structured.importance.registry import METRICS, MetricFacts, metric_of
    from shearing.pruning.structured.learner import MaskLearner
    from shearing.pruning.structured.mask_settings import MaskSettings
    from shearing.pruning.structured.masking import Masking
    from shearing.pruning.structured.parameter_budget import ParameterBudget, shape_or_budget
    from shearing.pruning.structured.recipe import PruneRecipe
    from shearing.pruning.structured.refitting.linear import Refitted, refit
    from shearing.pruning.structured.refitting.recipe import BlockRefitRecipe

__all__ = [
    "METRICS",
    "BlockRefitRecipe",
    "Constraint",
    "Evidence",
    "Granularity",
    "MaskLearner",
    "MaskSettings",
    "Masking",
    "MeanBias",
    "Metric",
    "MetricFacts",
    "ParameterBudget",
    "PruneRecipe",
    "Refitted",
    "Scores",
    "fold_means",
    "granularities_of",
    "metric_of",
    "refit",
    "shape_or_budget",
    "with_biases",
]

__getattr__ = late(
    __name__,
    {
        "BlockRefitRecipe": "refitting.recipe",
        "Constraint": "constraint",
        "Evidence": "importance.metric",
        "Granularity": "granularities",
        "METRICS": "importance.registry",
        "MaskLearner": "learner",
        "MaskSettings": "mask_settings",
        "Masking": "masking",
        "MeanBias": "importance.inputs.mean_bias",
        "Metric": "importance.metric",
        "MetricFacts": "importance.registry",
        "ParameterBudget": "parameter_budget",
        "PruneRecipe": "recipe",
        "Refitted": "refitting.linear",
        "Scores": "importance.metric",
        "fold_means": "importance.inputs.mean_bias",
        "granularities_of": "granularities",
        "metric_of": "importance.registry",
        "refit": "refitting.linear",
        "shape_or_budget": "parameter_budget",
        "with_biases": "importance.inputs.mean_bias",
    },
)
