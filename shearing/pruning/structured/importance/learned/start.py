"""What masks that are tried begin with: the scores of a metric that was measured before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from shearing.models.shape import Shape
from shearing.pruning.structured.importance.metric import Cost, Evidence, Scores
from shearing.pruning.structured.importance.registry import EVERYTHING, METRICS, metric_of
from shearing.pruning.structured.importance.text_loss import number_of_labels, require_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Start:
    """Scores of everything: those of a metric, and of `activations` what it does not give.

    Args:
        name: of the metric.
    """

    def __init__(self, name: str) -> None:
        complete = METRICS[name].gives == EVERYTHING
        self._metrics = [metric_of(each) for each in ((name,) if complete else ("activations", name))]

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """See `Metric.units_of_work`."""
        return sum(metric.units_of_work(source, evidence=evidence) for metric in self._metrics)

    def cost(self, source: Shape, *, evidence: Evidence, forward_tokens: float, backward_tokens: float = 0.0) -> Cost:
        """See `Metric.cost`; `forward_tokens` and `backward_tokens` are what comes after it."""
        before = [metric.cost(source, evidence=evidence) for metric in self._metrics]
        return Cost(
            forward_tokens=forward_tokens + sum(cost.forward_tokens for cost in before),
            backward_tokens=backward_tokens + sum(cost.backward_tokens for cost in before),
            other_flops=sum(cost.other_flops for cost in before),
            kept_bytes=max(cost.kept_bytes for cost in before),
        )

    def scores(self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None]) -> Scores:
        """See `Metric.scores`.

        Raises:
            ShearingError: the text that masks are to be tried on has no label.
        """
        require_labels(number_of_labels(evidence.text))
        scores: Scores = {}
        for metric in self._metrics:
            scores |= metric.scores(model, evidence=evidence, advance=advance)
        return scores
