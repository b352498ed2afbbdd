"""Importance of layers by the loss without them, each left out alone or the least harmful first.

Legend: L layers, T tokens of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shearing.models.shape import Shape
from shearing.pruning.structured.importance.depth.passage import (
    Passage,
    SubLayers,
    as_scores,
    cost_of,
    lowest_layer,
    parts_of,
)
from shearing.pruning.structured.importance.metric import Cost, Evidence, Scores
from shearing.pruning.structured.importance.text_loss import finite, number_of_labels, require_labels, sum_of_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LeaveOneOut:
    """Loss of the text, in nats a token, with one layer or sub-layer left out (arXiv 2402.02834 ranks perplexity).

    What comes before the part that is left out is computed once for all, which halves the cost. See `Metric`.

    Args:
        parts: `layers`; or `sublayers`: attention and MLP apart, on one scale.
    """

    def __init__(self, *, parts: str = "layers") -> None:
        self._parts = parts

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """One for each part and batch."""
        return len(parts_of(self._parts, layers=source.num_hidden_layers)) * len(evidence.own)

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """Half a pass for each part, and its head."""
        L, tokens = source.num_hidden_layers, evidence.text_tokens
        if self._parts == "layers":
            return cost_of(source, layers=_round_of_layers(L), heads=L, tokens=tokens)
        return cost_of(source, layers=L - 1 + L * (L + 1), heads=2 * L, tokens=tokens)

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `LeaveOneOut`."""
        parts = parts_of(self._parts, layers=model.config.num_hidden_layers)
        losses = _losses_without(model, evidence, parts=parts, gone=frozenset(), advance=advance)
        return as_scores(self._parts, losses)


class GreedyLeaveOneOut:
    """How late a layer goes where the one goes whose absence the loss minds least, with those gone that went before.

    As many go as the target says; without one, half of them. What stays is ranked as the last round found it. `Metric`
    says the rest. One at a time, as `LeaveOneOut` has it, cannot know that of two layers that stand in for each other
    one has to stay.
    """

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """One for each layer that is tried, and batch."""
        return sum(_left_in_each_round(source, target=evidence.target)) * len(evidence.own)

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """In each round half a pass of what is left for each layer that is left, and its head."""
        rounds = _left_in_each_round(source, target=evidence.target)
        layers = sum(_round_of_layers(left) for left in rounds)
        return cost_of(source, layers=layers, heads=sum(rounds), tokens=evidence.text_tokens)

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `GreedyLeaveOneOut`."""
        source = Shape.of(model.config)
        parts = parts_of("layers", layers=source.num_hidden_layers)
        staying = list(range(len(parts)))
        order: list[int] = []
        for _ in _left_in_each_round(source, target=evidence.target):
            losses = _losses_without(
                model,
                evidence,
                parts=[parts[layer] for layer in staying],
                gone=frozenset().union(*(parts[layer] for layer in order)),
                advance=advance,
            )
            ranked = [staying[position] for position in losses.argsort(stable=True).tolist()]
            order.append(ranked[0])
            staying.remove(ranked[0])
        scores = torch.empty(len(parts))
        scores[[*order, *ranked[1:]]] = torch.arange(len(parts), dtype=torch.float32)
        return {"layers": scores}


def _left_in_each_round(source: Shape, *, target: Shape | None) -> list[int]:
    L = source.num_hidden_layers
    keep = L - L // 2 if target is None else target.num_hidden_layers
    return list(range(L, min(keep, L - 1), -1))


def _round_of_layers(left: int) -> int:
    """Layers that are computed to try each of `left` layers: what comes before the last, and after each."""
    return left - 1 + left * (left - 1) // 2


@torch.no_grad()
def _losses_without(
    model: PreTrainedModel,
    evidence: Evidence,
    *,
    parts: Sequence[SubLayers],
    gone: SubLayers,
    advance: Callable[[int], None],
) -> Tensor:
    """Mean loss without each of the parts, fp64 [number of parts].

    Args:
        parts: each inside one layer, from the bottom up.
        gone: what is not there besides.
    """
    labels = require_labels(number_of_labels(evidence.text))
    sums = torch.zeros(len(parts), dtype=torch.float64)
    for batch in (share.inputs for share in evidence.own):
        passage, here = Passage(model, batch), 0
        stream = passage.stream
        for number, part in enumerate(parts):
            for layer in range(here, first := lowest_layer(part)):
                stream = passage.through_layer(layer, stream, gone=gone)
            here = first
            hidden = passage.to_end(stream, first=first, gone=gone | part)
            sums[number] += finite(float(sum_of_losses(model, hidden, batch)), metric="leave_one_out")
            advance(1)
    return evidence.processes.sum(sums) / labels
