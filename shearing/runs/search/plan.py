"""What a search will run, checked before anything is run: candidates, the recipes of their rounds, what it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from shearing.data.corpus.corpus import whole_rows
from shearing.data.documents import Inputs
from shearing.errors import ShearingError
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.registry import METRICS, metric_of
from shearing.pruning.structured.refitting.linear import refit_cost
from shearing.runs.planning.hardware import flops_of, rotation_flops, teacher_flops_per_token, training_flops_per_token
from shearing.runs.race.recipes import warmup_from_nothing
from shearing.runs.recipe import Recipe, overridden
from shearing.runs.run_directory import Stage
from shearing.runs.search.candidates import Candidate, search_of
from shearing.runs.search.recipe import Round
from shearing.settings.quantities import Duration

if TYPE_CHECKING:
    from transformers import PretrainedConfig

STAGES: Sequence[Stage] = ("prune", "compact", "pretrain")
"""Of a candidate's run; it is judged by the search."""


@dataclass(frozen=True, kw_only=True)
class SearchFolder:
    """Where everything of a search is.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def candidates(self) -> Path:
        """The candidates (JSON), written once."""
        return self.path / "candidates.json"

    @property
    def layer_times(self) -> Path:
        """The table of layer times of this device (JSON), where the budget is a latency."""
        return self.path / "layer-times.json"

    @property
    def times(self) -> Path:
        """Times of the candidates' shapes (JSON)."""
        return self.path / "times.json"

    @property
    def results(self) -> Path:
        """The tables, as values (JSON)."""
        return self.path / "results.json"

    @property
    def tables(self) -> Path:
        """The tables (markdown)."""
        return self.path / "results.md"

    @property
    def picture(self) -> Path:
        """Loss against size and latency."""
        return self.path / "results.svg"

    @property
    def recipe(self) -> Path:
        """The recipe with the winner as its target."""
        return self.path / "recipe.yaml"

    def of(self, name: str) -> Path:
        """Folder of a candidate."""
        return self.path / "candidates" / name

    def run(self, name: str) -> Path:
        """Folder of a candidate's run."""
        return self.of(name) / "run"

    def log(self, name: str) -> Path:
        """What a candidate's run says."""
        return self.of(name) / "log.txt"

    def record(self, name: str, *, number: int) -> Path:
        """What a candidate was worth after a round, from 1 (JSON)."""
        return self.of(name) / f"round-{number}.json"


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """What a search will run.

    Attributes:
        rounds: in order; no more candidates than there are.
        steps: of a candidate in all at the end of each round.
        choosing: FLOPs of scores and refit of each candidate.
        per_token: FLOPs of a training token of each candidate.
        teacher_per_token: FLOPs of the teacher, of a training token.
    """

    rounds: Sequence[Round]
    steps: Sequence[int]
    choosing: Mapping[Candidate, float]
    per_token: Mapping[Candidate, float]
    teacher_per_token: float

    @property
    def candidates(self) -> list[Candidate]:
        """All of them."""
        return list(self.choosing)

    def tokens(self, *, per_step: int) -> int:
        """Training tokens of all rounds together.

        Args:
            per_step: of an optimiser step.
        """
        before = 0
        total = 0
        for each, steps in zip(self.rounds, self.steps, strict=True):
            total += each.candidates * (steps - before) * per_step
            before = steps
        return total

    def flops(self, *, per_step: int) -> float:
        """Of everything but the measuring of losses; who goes on to later rounds is taken to be of the mean size.

        Args:
            per_step: tokens of an optimiser step.
        """
        mean = sum(self.per_token.values()) / len(self.per_token) + self.teacher_per_token
        return sum(self.choosing.values()) + mean * self.tokens(per_step=per_step)


def plan_search(
    recipe: Recipe, candidates: Sequence[Candidate], *, config: PretrainedConfig, teacher: Shape | None
) -> SearchPlan:
    """Rounds and FLOPs of a search.

    Args:
        recipe: of the search.
        candidates: of its first round.
        config: of the source model.
        teacher: that reads along; None: none.

    Raises:
        ShearingError: rounds that are no longer than those before.
    """
    search, source, length = search_of(recipe), Shape.of(config), recipe.data.sequence_length
    rounds = [Round(min(each.candidates, len(candidates)), each.tokens) for each in search.parsed_rounds]
    return SearchPlan(
        rounds=rounds,
        steps=steps_of(recipe),
        choosing={candidate: _choosing(recipe, source=source, target=candidate.shape) for candidate in candidates},
        per_token={
            candidate: training_flops_per_token(candidate.shape, sequence_length=length) for candidate in candidates
        },
        teacher_per_token=teacher_flops_per_token(teacher, distill=recipe.distill, sequence_length=length),
    )


def steps_of(recipe: Recipe) -> list[int]:
    """Optimiser steps of a candidate in all at the end of each round.

    Raises:
        ShearingError: a round without a step, or a decay that begins before the last round.
    """
    search = search_of(recipe)
    per_step = recipe.pretrain.tokens_per_step(sequence_length=recipe.data.sequence_length)
    steps = [-(-each.tokens // per_step) for each in search.parsed_rounds]
    for before, after in pairwise(steps):
        if after <= before:
            raise ShearingError(
                "search.rounds",
                value=search.rounds,
                allowed=f"rounds that are longer than those before by a step at least, of {per_step:,} tokens",
                mend="give more tokens, or set a smaller pretrain.batch_size",
            )
    earlier = steps[-2] if len(steps) > 1 else 0
    if decay_steps(recipe, total=steps[-1]) > steps[-1] - earlier:
        raise ShearingError(
            "search.decay",
            value=str(search.decay),
            allowed=f"at most what the last round adds: {steps[-1] - earlier} steps",
            mend="shorten it, or give the last round more tokens",
        )
    return steps


def decay_steps(recipe: Recipe, *, total: int) -> int:
    """Steps of the last round in which the rate falls.

    Args:
        recipe: of the search.
        total: steps of a candidate at its end.
    """
    per_step = recipe.pretrain.tokens_per_step(sequence_length=recipe.data.sequence_length)
    return search_of(recipe).decay.in_steps(tokens_per_step=per_step, total_steps=total)


def recipe_of(recipe: Recipe, candidate: Candidate, *, number: int, folder: SearchFolder) -> Recipe:
    """The recipe of a candidate's run as it is at the end of a round: an ordinary one.

    Units are chosen by scores and what stays is refitted, without a step of mask learning; then the rate is constant
    after the warm-up, so that a longer run goes on from a shorter one as if it had been that long from the start. The
    warm-up is that of the stage whose optimiser starts from nothing in the recipe, as here it does in `pretrain`.

    Args:
        recipe: of the search.
        candidate: whose.
        number: of the round, from 1.
        folder: of the search.

    Raises:
        ShearingError: a recipe that cannot be raced so.
    """
    steps = steps_of(recipe)
    last = steps[-1]
    per_step = recipe.pretrain.tokens_per_step(sequence_length=recipe.data.sequence_length)

    def in_steps(duration: Duration) -> int:
        return duration.in_steps(tokens_per_step=per_step, total_steps=last)

    overrides = [
        f"name={json.dumps(candidate.name)}",
        f"run_dir={json.dumps(str(folder.run(candidate.name)))}",
        "search=null",
        "resume=auto",
        "one_schedule=false",
        "model.save_dtype=fp32",  # judged as it was trained
        "target.parameters=null",
        "target.uniform=false",
        "target.multiple_of=1",
        "target.vocab_size=null",
        *candidate.overrides,
        "prune.duration=0 steps",
        "prune.keep_last=1",
        f"mixture.pretrain_interval={max(1, in_steps(recipe.mixture.pretrain_interval))} steps",
        "pretrain.optimizer=fresh",
        f"pretrain.warmup={min(in_steps(warmup_from_nothing(recipe)), steps[0])} steps",
        "pretrain.keep_last=1",
        "pretrain.keep_every=null",
        "pretrain.validation_interval=null",  # judged at the end of a round, on more text
        *onward_of(recipe, number=number),
    ]
    if recipe.distill is not None and recipe.distill.hidden is not None:
        overrides.append(f"distill.hidden.decay={in_steps(recipe.distill.hidden.decay)} steps")
    return overridden(recipe, overrides=overrides)


def onward_of(recipe: Recipe, *, number: int) -> list[str]:
    """The keys of a candidate's run that change from round to round, at the end of one.

    Args:
        recipe: of the search.
        number: of the round, from 1.
    """
    steps = steps_of(recipe)
    length = steps[number - 1]
    falls = decay_steps(recipe, total=length) if number == len(steps) else 0
    schedule = ["pretrain.schedule=wsd", f"pretrain.decay={falls} steps"] if falls else ["pretrain.schedule=constant"]
    return [f"pretrain.duration={length} steps", *schedule]


def mistakes(recipe: Recipe) -> list[ShearingError]:
    """What cannot be searched whatever the model is."""
    found = []
    prune = recipe.pruning.prune
    if prune.graded_by is None:
        found.append(
            ShearingError(
                "prune.initial_masks",
                value=prune.initial_masks if prune.masks == "learned" else f"with prune.masks={prune.masks}",
                allowed="a metric, with prune.masks=learned: candidates are cut by scores",
                mend="set prune.initial_masks=reconstruction, and prune.masks=learned",
            )
        )
    for key, section in (
        ("sparsify", recipe.sparsify),
        ("pretrain.lora", recipe.pretrain.lora),
        ("cascade", recipe.cascade),
        ("family", recipe.family),
    ):
        if section is not None:
            found.append(
                ShearingError(
                    key, value="a section", allowed="none in a search of shapes", mend=f"set {key}=null for the search"
                )
            )
    if recipe.training.engine != "torch":
        found.append(
            ShearingError(
                "training.engine",
                value=recipe.training.engine,
                allowed="torch: each candidate has a process and a device of its own",
                mend="set training.engine=torch for the search",
            )
        )
    return found


def _choosing(recipe: Recipe, *, source: Shape, target: Shape) -> float:
    """FLOPs of a candidate's scores, of its rotation and of its refit."""
    prune, length = recipe.pruning.prune, recipe.data.sequence_length
    rows = whole_rows(prune.calibration_tokens, sequence_length=length)
    flops = rotation_flops(source, prune=prune, sequence_length=length)
    if (name := prune.graded_by) is not None:
        text = (Inputs(torch.empty(rows, length, dtype=torch.int64, device="meta"), None),)
        evidence = Evidence(text=text if METRICS[name].reads_text else (), target=target, seed=recipe.seed)
        flops += flops_of(metric_of(name).cost(source, evidence=evidence), source, sequence_length=length)
    if prune.refits(sequence_length=length):
        cost = refit_cost(
            source,
            target=target,
            text_tokens=rows * length,
            ridge=prune.refit_ridge,
            blocks=prune.block_refit,
            sequence_length=length,
        )
        flops += flops_of(cost, source, sequence_length=length)
    return flops
