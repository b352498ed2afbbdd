"""Importance by policy gradient: chances to be kept, learned from the losses of random masks without backward passes.

Legend: s chances to be kept, m masks drawn from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shearing.models.anatomy import head_weight
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import Granularity
from shearing.pruning.structured.importance.learned.masked_loss import frozen, steps_for
from shearing.pruning.structured.importance.learned.rows import at_most, ranks, searched, with_sum
from shearing.pruning.structured.importance.learned.start import Start
from shearing.pruning.structured.importance.metric import Cost, Evidence, Scores
from shearing.pruning.structured.importance.text_loss import finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNDECIDED = 0.02
"""Chances keep this distance from 0 and 1, where a draw says nothing about its unit, until the last tenth."""


class PolicyGradient:
    """Chances of all units that the target takes from, by gradient estimates from forward passes (arXiv 2406.10576).

    Each step draws two masks for `STEP_SEQUENCES` sequences (4) and moves s against
    (L_1 - L_2) (m_1 - m_2) / (2 s (1 - s)), which is unbiased (leave one out of two); the published code has a moving
    average of losses in its place, and the root of s (1 - s). Then rows that expect more units than the target's are
    shifted back. Published are 15,000 steps, for KV groups and MLP units of all layers together. Ours are few: this
    estimate finds layers rather than MLP units, each of which hardly shows in the loss of a mask. Scores are ranks,
    those of equal chances by the start. What the target leaves whole, and sub-layers, have the scores of `start`. See
    `Metric`.

    Args:
        epochs: how often the text is gone through, one step for every 4 sequences.
        rate: of the steps in s, falling to 0 as a cosine; published are 2e-3 for Llama-2 and 6e-3 for Llama-3.
        start: name of a metric: chances begin with its z-scores in a row through the logistic function, shifted to
            expect the target's units. Wanda's score summed over structures is the published one; what a metric does not
            give, `activations` does.
    """

    def __init__(self, *, epochs: int = 8, rate: float = 2e-3, start: str = "wanda") -> None:
        self._epochs, self._rate, self._start = epochs, rate, Start(start)

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """One for each step, and those of what it starts from."""
        before = self._start.units_of_work(source, evidence=evidence)
        return before + self._epochs * len(evidence.steps)

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """Two forward passes over the text in each epoch, and what the start costs."""
        tokens = 2 * self._epochs * evidence.text_tokens
        return self._start.cost(source, evidence=evidence, forward_tokens=tokens)

    @torch.no_grad()
    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `PolicyGradient`."""
        start = self._start.scores(model, evidence=evidence, advance=advance)
        granularities = searched(Shape.of(model.config), target=evidence.target)
        chances = {g.name: initial_chances(start[g.name], granularity=g) for g in granularities}
        generator = torch.Generator().manual_seed(evidence.seed)
        device = head_weight(model).device
        text = steps_for(evidence)
        steps = self._epochs * len(text)
        with frozen(model) as loss_of:
            for step in range(steps):
                here = text[step % len(text)]
                draws = [
                    {name: torch.bernoulli(s, generator=generator) for name, s in chances.items()} for _ in range(2)
                ]
                parts = torch.zeros(2, dtype=torch.float64)
                for index, drawn in enumerate(draws):
                    z = {name: m.float().to(device) for name, m in drawn.items()}
                    parts[index] = sum(float(loss_of(z, piece) / here.labels) for piece in here.own)
                losses = [finite(loss, metric="policy_gradient") for loss in evidence.processes.sum(parts).tolist()]
                rate = self._rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                for g in granularities:
                    s, (first, second) = chances[g.name], (z[g.name] for z in draws)
                    gradient = leave_one_out_gradient(s, masks=(first, second), losses=(losses[0], losses[1]))
                    low, high = _bounds(g, decided=10 * step >= 9 * steps)
                    chances[g.name] = at_most(s - rate * gradient, total=_keep(g), low=low, high=high)
                advance(1)
        return {**start, **{name: ranks(s, ties=start[name].double()) for name, s in chances.items()}}


def leave_one_out_gradient(s: Tensor, *, masks: tuple[Tensor, Tensor], losses: tuple[float, float]) -> Tensor:
    """Unbiased estimate of the gradient of E[L] by the chances s, from two independent masks.

    The score (m - s) / (s (1 - s)) of each mask, weighed by its loss less the other's, averaged over both:

        (L_1 - L_2) (m_1 - m_2) / (2 s (1 - s))
    """
    variance = (s * (1 - s)).clamp_min(torch.finfo(s.dtype).eps)  # where it is 0, both masks are equal
    return (losses[0] - losses[1]) * (masks[0] - masks[1]) / (2 * variance)


def initial_chances(scores: Tensor, *, granularity: Granularity) -> Tensor:
    """Chances of the scores' shape, fp64, each row of which expects the target's number of units."""
    scores = scores.double()
    spread = scores.std(-1, keepdim=True, correction=0).clamp_min(torch.finfo(scores.dtype).tiny)
    likely = torch.sigmoid((scores - scores.mean(-1, keepdim=True)) / spread)
    low, high = _bounds(granularity, decided=False)
    return with_sum(likely, total=_keep(granularity), low=low, high=high)


def _keep(granularity: Granularity) -> int:
    assert granularity.target is not None
    return granularity.target


def _bounds(granularity: Granularity, *, decided: bool) -> tuple[float, float]:
    """Between which chances stay; the target's share lies between."""
    if decided:
        return 0.0, 1.0
    share = _keep(granularity) / granularity.units
    return min(_UNDECIDED, share / 2), max(1 - _UNDECIDED, (1 + share) / 2)
