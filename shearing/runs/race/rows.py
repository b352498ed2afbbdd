"""The rows of a race: who runs with which seed for how many steps, and what is asked of a race."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

from shearing.pruning.structured.importance.registry import METRICS
from shearing.runs.race.methods import METHODS, START, Contender, Ranking, Stages, contender_of
from shearing.runs.recipe import Recipe

Refit = Literal["both", "with", "without"]
Equal = Literal["tokens", "flops"]


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """What is asked of a race.

    Attributes:
        recipe: source, target, text, sizes of a step, its schedule (`pretrain`) and how masks are learned (`prune`).
        output: folder of the race.
        tokens: budgets.
        methods: names in `METHODS`.
        seeds: of text, masks and chance.
        refit: which forms of a method run, of those that it has.
        equal: what rows have in common at a budget: tokens, FLOPs, or one table for each.
        flops: the common budget at equal FLOPs; None: what `start` takes at the budget in tokens.
        rest_by: metric that scores what another one leaves out.
        keep_models: keep the final model of every row.
        retry_failed: run rows again that have failed.
    """

    recipe: Recipe
    output: Path
    tokens: tuple[int, ...]
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0,)
    refit: Refit = "both"
    equal: tuple[Equal, ...] = ("tokens", "flops")
    flops: float | None = None
    rest_by: str = "reconstruction"
    keep_models: bool = False
    retry_failed: bool = False

    @property
    def contenders(self) -> list[Contender]:
        """Every method in every form that is asked for; one that has only the other form runs in that."""
        wanted = {"both": {False, True}, "with": {True}, "without": {False}}[self.refit]
        return [
            contender_of(method, refitted=refitted, rest_by=self.rest_by)
            for method in self.methods
            for refitted in sorted(METHODS[method].refits & wanted or METHODS[method].refits)
        ]

    @property
    def own_forms(self) -> list[Contender]:
        """Those whose scores give sizes by layer, with these sizes."""
        return [
            replace(contender, own_sizes=True)
            for contender in self.contenders
            if isinstance(how := contender.facts.how, Ranking) and METRICS[how.metric].across_layers
        ]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contender with a seed, trained for a number of optimiser steps in all; for 0, it is only evaluated."""

    contender: Contender
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.contender.name}-seed{self.seed}-{self.steps}steps"

    @property
    def cut_name(self) -> str:
        """Of the cut model that it shares with rows of other lengths."""
        return f"{self.contender.name}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How steps and tokens of a race go together.

    Attributes:
        tokens_per_step: of all rows.
        mask_share: of the steps of a row that learns masks, those before the cut.
    """

    tokens_per_step: int
    mask_share: Fraction

    @classmethod
    def of(cls, recipe: Recipe) -> Steps:
        """The recipe's batch of `pretrain`, and its two stages' shares of the steps."""
        length = recipe.data.sequence_length
        of_masks, after = (
            recipe.training_stages[stage].total_steps(sequence_length=length) for stage in ("prune", "pretrain")
        )
        return cls(
            tokens_per_step=recipe.pretrain.tokens_per_step(sequence_length=length),
            mask_share=Fraction(of_masks, of_masks + after),
        )

    def of_tokens(self, tokens: int) -> int:
        """Whole steps in a budget."""
        return tokens // self.tokens_per_step

    def before_cut(self, steps: int, *, how: Stages) -> int:
        """Of so many steps of a method: at least one, and one is left."""
        return min(max(1, round(steps * (how.share or self.mask_share))), steps - 1)


def baseline_of(contenders: list[Contender]) -> Contender | None:
    """The start that differences are to: refitted if it runs so."""
    starts = [contender for contender in contenders if contender.method == START]
    return max(starts, key=lambda contender: contender.refitted, default=None)
