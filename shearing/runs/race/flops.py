"""What a row takes in floating-point operations: choosing, the refit, steps under masks, steps after the cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shearing.models.shape import Shape
from shearing.pruning.structured.importance.metric import Cost, Evidence
from shearing.pruning.structured.importance.registry import metric_of
from shearing.pruning.structured.refitting.linear import refit_cost
from shearing.runs.planning.hardware import flops_of, training_flops_per_token
from shearing.runs.race.methods import Contender, Ranking, Stages
from shearing.runs.race.rows import Steps
from shearing.runs.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of one row.

    Attributes:
        choosing: scores of units, of all metrics that it takes.
        refit: of the weights that stay.
        masked: steps of mask learning, at the source's size, with those of a teacher.
        training: steps after the cut, with those of a teacher.
    """

    choosing: float = 0.0
    refit: float = 0.0
    masked: float = 0.0
    training: float = 0.0

    @property
    def total(self) -> float:
        """Of all of it."""
        return self.choosing + self.refit + self.masked + self.training


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """How a race counts: measuring losses is not counted, as it is no part of any method.

    Attributes:
        source, target: shapes.
        sequence_length: of training and of the text that metrics read.
        evidence: what metrics may go by, for what they say that they cost.
        steps: how tokens and steps of the race go together.
        recipes: of each contender, of a row of any length.
        teacher_per_token: of the model that is distilled from and reads along, in every step; 0: none does.
    """

    source: Shape
    target: Shape
    sequence_length: int
    evidence: Evidence
    steps: Steps
    recipes: Mapping[Contender, Recipe]
    teacher_per_token: float = 0.0

    def of(self, contender: Contender, *, steps: int) -> Flops:
        """What a contender takes for so many optimiser steps."""
        per_step = self.steps.tokens_per_step
        masked = 0
        if isinstance(how := contender.facts.how, Stages):
            masked = self.steps.before_cut(steps, how=how)
        at_source, at_target = (
            (training_flops_per_token(shape, sequence_length=self.sequence_length) + self.teacher_per_token) * per_step
            for shape in (self.source, self.target)
        )
        return Flops(
            choosing=sum(self.choosing(contender).values()),
            refit=self._refit(contender) if contender.refitted else 0.0,
            masked=masked * at_source,
            training=(steps - masked) * at_target,
        )

    def _refit(self, contender: Contender) -> float:
        prune = self.recipes[contender].pruning.prune
        return self._flops(
            refit_cost(
                self.source,
                target=self.target,
                text_tokens=self.evidence.text_tokens,
                ridge=prune.refit_ridge,
                blocks=prune.block_refit,
                sequence_length=self.sequence_length,
            )
        )

    def choosing(self, contender: Contender) -> dict[str, float]:
        """What each metric takes that a contender's units are chosen by."""
        metrics = metrics_of(contender, recipe=self.recipes[contender])
        return {name: self._flops(metric_of(name).cost(self.source, evidence=self.evidence)) for name in metrics}

    def _flops(self, cost: Cost) -> float:
        return flops_of(cost, self.source, sequence_length=self.sequence_length)


def metrics_of(contender: Contender, *, recipe: Recipe) -> tuple[str, ...]:
    """The metrics that choose a contender's units, or grade where its masks start.

    Args:
        contender: who.
        recipe: of one of its rows.
    """
    how = contender.facts.how
    if isinstance(how, Ranking):
        return (how.metric,) if contender.rest_by is None else (how.metric, contender.rest_by)
    start = recipe.pruning.prune.graded_by
    return (start,) if isinstance(how, Stages) and start is not None else ()


def steps_within(budget: float, *, cost: Callable[[int], float], least: int) -> int | None:
    """The most steps that cost no more than a budget; None if not even the least do.

    Args:
        budget: FLOPs.
        cost: of so many steps, rising with them.
        least: steps that a row has to have.
    """
    if cost(least) > budget:
        return None
    low, high = least, least + 1
    while cost(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low
