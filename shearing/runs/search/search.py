"""`shear search`: from a recipe to the shape that does best at a budget; killed anywhere, the same command goes on.

Processes share out the candidates of a round without talking to each other: whoever finds one whose folder nobody holds
takes it. So any number of them, here or on other machines that see the folder, work on one search, and what one of them
leaves when it is killed another takes over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from shearing.errors import ShearingError, named
from shearing.evaluation.environment import environment
from shearing.evaluation.layer_times import LayerTimes, Times, measure_layers, model_by_chance, times_of
from shearing.files.durable import locked, read_json, require_writable, write_json, write_text
from shearing.models.shape import Shape
from shearing.progress import activity, clock, quiet_deepspeed
from shearing.runs.context import RunContext
from shearing.runs.names import COMPONENT_NAMES
from shearing.runs.planning.disk import bytes_free, bytes_in
from shearing.runs.planning.memory import CHECKPOINT_BYTES_PER_PARAMETER
from shearing.runs.planning.preflight import preflight
from shearing.runs.planning.summary import gigabytes
from shearing.runs.race.recipes import warmup_from_nothing
from shearing.runs.race.records import RaceFolder, model_fingerprint, require_same_race, settings_of
from shearing.runs.recipe import Recipe, overridden
from shearing.runs.search.candidates import (
    DTYPES,
    Candidate,
    budget_of,
    candidates_at,
    named_candidates,
    search_of,
    shapes_to_time,
)
from shearing.runs.search.picture import draw_search
from shearing.runs.search.plan import STAGES, SearchFolder, SearchPlan, mistakes, plan_search, recipe_of
from shearing.runs.search.running import Runner
from shearing.runs.search.summary import contenders, loss_of, summarise, winner_of
from shearing.runs.search.tables import markdown_tables, plan_table, rich_tables

PAUSE = 1.0
"""Seconds between two looks at what other processes have done."""

_BYTES_PER_PARAMETER = CHECKPOINT_BYTES_PER_PARAMETER + 8
"""Of a candidate that waits for the next round: a checkpoint, the cut model and the trained one."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What is asked of a search.

    Attributes:
        recipe: source, text, sizes of a step, the section `search`.
        output: folder of the search.
        keep_runs: keep the weights of candidates that are out.
        retry_failed: run candidates again that have failed.
    """

    recipe: Recipe
    output: Path
    keep_runs: bool = False
    retry_failed: bool = False

    @property
    def folder(self) -> SearchFolder:
        """Where everything is."""
        return SearchFolder(path=self.output)


class Search:
    """A search: its candidates, its plan, what has become of them.

    Args:
        settings: what is asked for.
        console: where progress goes; stdout if None.

    Raises:
        ShearingError: something the user can mend; before any candidate runs.
    """

    def __init__(self, settings: SearchSettings, *, console: Console | None = None) -> None:
        self.settings, self.folder = settings, settings.folder
        self._console = console or Console()
        self._recipe = settings.recipe
        if wrong := mistakes(self._recipe):
            raise wrong[0]
        quiet_deepspeed()
        # Its bars for loading weights would break the live line.
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        require_writable(settings.output, field="--output")
        self._context = RunContext(self._recipe, console=self._console)
        self._source = Shape.of(self._context.config_as_cut)
        self._budget = budget_of(self._recipe, config=self._context.config_as_cut)
        self._runner = Runner(recipe=self._recipe, folder=self.folder, console=self._console)

    @named(COMPONENT_NAMES)
    def prepare(self) -> SearchPlan:
        """Choose the candidates, or read who they are, and check that all of it can run.

        Raises:
            ShearingError: no shape at the budget, another search in the folder, or what `preflight` finds.
        """
        with locked(self.settings.output, field="--output"):
            self._require_same()
            candidates = self._candidates()
            made = self._plan(candidates)
            largest = max(candidates, key=lambda candidate: candidate.shape.num_parameters())
            recipe = recipe_of(self._recipe, largest, number=1, folder=self.folder)
            with named({"run_dir": "--output"}):
                preflight(RunContext(recipe, console=self._console), stages=STAGES)
            self._require_disk(made)
            # It has begun: only now other keys are another search.
            require_same_race(RaceFolder(path=self.folder.path), settings=self._settings())
            write_json(self.folder.candidates, {"candidates": [candidate.to_json() for candidate in candidates]})
            if self.settings.retry_failed:
                self._forget_failures(made)
            self._measure_times(made)
        return made

    def plan(self) -> SearchPlan:
        """Its plan, of candidates that are there already or would be.

        Raises:
            ShearingError: no shape at the budget, or another search in the folder.
        """
        self._require_same()
        return self._plan(self._candidates())

    def join(self) -> SearchPlan:
        """The plan of a search that another process has prepared.

        Raises:
            ShearingError: there is none, or one of other settings.
        """
        if not self.folder.candidates.is_file():
            raise ShearingError(
                "--join",
                value=str(self.folder.path),
                allowed="the folder of a search that has begun",
                mend="start it without --join first",
            )
        return self.plan()

    def work(self, plan: SearchPlan) -> None:
        """Bring candidates through the rounds, together with whoever else does.

        Raises:
            ShearingError: something that is no candidate's fault, or all candidates failed.
            Interrupted: a signal asked to stop.
        """
        for number in range(1, len(plan.rounds) + 1):
            there = contenders(plan, self._records(plan), number=number)
            assert there is not None
            if not there:
                raise self._all_failed(plan)
            self._round(plan, there, number=number)
            after = contenders(plan, self._records(plan), number=number + 1) if number < len(plan.rounds) else there
            for candidate in there:
                if after is not None and candidate not in after and not self.settings.keep_runs:
                    self._runner.drop_weights(candidate)

    def finish(self, plan: SearchPlan) -> dict[str, Any]:
        """Write tables, picture and the recipe of the winner.

        Returns:
            The content of results.json, see `summarise`.
        """
        records = self._records(plan)
        results = {
            **summarise(
                self._recipe,
                plan,
                records,
                budget=self._budget,
                measured=self._measured(),
                layer_times=self._layer_times(measure=False),
            ),
            "environment": environment(self._context.device),
        }
        write_json(self.folder.results, results)
        write_text(self.folder.tables, markdown_tables(results))
        draw_search(results, path=self.folder.picture)
        winner = winner_of(plan, records)
        if winner is not None:
            write_text(self.folder.recipe, self._winning(winner).to_yaml())
            self._console.print(rich_tables(results))
            self._print(
                f"recipe of the best: {self.folder.recipe}; tables: {self.folder.tables}; picture: "
                f"{self.folder.picture}; its run so far: {self.folder.run(winner.name)}"
            )
        return results

    def print_plan(self, plan: SearchPlan) -> None:
        """Say what will run."""
        self._console.print(plan_table(plan, recipe=self._recipe, left=self._left(plan)))

    def _require_same(self) -> None:
        """Check that a search that has begun in the folder, if one has, is this one; nothing is written."""
        race = RaceFolder(path=self.folder.path)
        if race.settings.is_file():
            require_same_race(race, settings=self._settings())

    def _plan(self, candidates: list[Candidate]) -> SearchPlan:
        teacher = self._context.teacher_shape if self._recipe.listens_online else None
        return plan_search(self._recipe, candidates, config=self._context.config_as_cut, teacher=teacher)

    def _candidates(self) -> list[Candidate]:
        if self.folder.candidates.is_file():
            stored = read_json(self.folder.candidates)["candidates"]
            return [Candidate.from_json(each, source=self._source) for each in stored]
        if self._budget is None:
            return named_candidates(self._recipe, config=self._context.config_as_cut)
        times = self._layer_times(measure=True) if self._budget.kind == "latency" else None
        return candidates_at(self._recipe, self._budget, config=self._context.config_as_cut, times=times)

    def _layer_times(self, *, measure: bool) -> LayerTimes | None:
        """The table of layer times: kept in the folder, as it is of this device and this moment."""
        search, config = search_of(self._recipe), self._context.config_as_cut
        shapes = shapes_to_time(self._recipe, config=config)
        if self.folder.layer_times.is_file():
            found = LayerTimes.from_json(read_json(self.folder.layer_times))
            if not measure or found.is_of(shapes, context=search.context, dtype=DTYPES[search.dtype]):
                return found
        if not measure:
            return None
        with activity("layer times", total=len(shapes), console=self._console) as advance:
            found = measure_layers(
                shapes,
                config=config,
                context=search.context,
                dtype=DTYPES[search.dtype],
                device=self._context.device,
                advance=advance,
            )
        write_json(self.folder.layer_times, found.to_json())
        return found

    def _measure_times(self, plan: SearchPlan) -> None:
        """Time the shapes of the candidates, once."""
        wanted = self._recipe.evaluation.speed or (self._budget is not None and self._budget.kind == "latency")
        if not wanted or self.folder.times.is_file():
            return
        search, found = search_of(self._recipe), {}
        with activity("times of the candidates", total=len(plan.candidates), console=self._console) as advance:
            for candidate in plan.candidates:
                model = model_by_chance(
                    candidate.shape,
                    config=self._context.config_as_cut,
                    dtype=DTYPES[search.dtype],
                    device=self._context.device,
                )
                found[candidate.name] = vars(times_of({"model": model}, context=search.context)["model"])
                advance(1)
        write_json(self.folder.times, found)

    def _measured(self) -> dict[str, Times]:
        if not self.folder.times.is_file():
            return {}
        return {name: Times(**times) for name, times in read_json(self.folder.times).items()}

    def _round(self, plan: SearchPlan, there: list[Candidate], *, number: int) -> None:
        """Every candidate of a round that is missing, by this process or another."""
        waits = False
        while missing := [each for each in there if not self._is_there(each, number=number)]:
            taken = False
            for candidate in missing:
                if not self._is_there(candidate, number=number) and self._runner.advance(candidate, number=number):
                    taken, waits = True, False
                    self._say(plan, candidate, number=number)
            if not taken:
                if not waits:
                    names = ", ".join(each.name for each in missing)
                    self._print(f"round {number}: waiting for other processes: {names}")
                waits = True
                time.sleep(PAUSE)

    def _is_there(self, candidate: Candidate, *, number: int) -> bool:
        return self.folder.record(candidate.name, number=number).is_file()

    def _say(self, plan: SearchPlan, candidate: Candidate, *, number: int) -> None:
        record = read_json(self.folder.record(candidate.name, number=number))
        loss, left = loss_of(record), self._left(plan)
        text = f"failed: {record['failed']}" if loss is None else f"validation loss {loss:.3f}"
        pace = "" if left is None else f"; about {clock(left)} of training left, of all processes together"
        self._print(f"round {number}: {candidate.name}: {text}{pace}")

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _records(self, plan: SearchPlan) -> dict[tuple[Candidate, int], Mapping[str, Any]]:
        return {
            (candidate, number): read_json(path)
            for candidate in plan.candidates
            for number in range(1, len(plan.rounds) + 1)
            if (path := self.folder.record(candidate.name, number=number)).is_file()
        }

    def _left(self, plan: SearchPlan) -> float | None:
        """Seconds of training that are left, by the pace so far; None before the first candidate has ended."""
        per_step = self._recipe.pretrain.tokens_per_step(sequence_length=self._recipe.data.sequence_length)
        newest: dict[Candidate, Mapping[str, Any]] = {}
        for (candidate, _), record in self._records(plan).items():
            if "failed" not in record:
                newest[candidate] = record
        done = sum(record["tokens"] for record in newest.values())
        seconds = sum(record["seconds"] for record in newest.values())
        return seconds / done * max(0, plan.tokens(per_step=per_step) - done) if done else None

    def _winning(self, winner: Candidate) -> Recipe:
        """The recipe of the search with the winner as its target."""
        open_ = ["target.parameters=null", "target.uniform=false", "target.multiple_of=1", "search=null"]
        return overridden(self._recipe, overrides=[*open_, *winner.overrides])

    def _settings(self) -> dict[str, Any]:
        """What figures depend on."""
        context, source = self._context, self._recipe.model
        common = settings_of(
            self._recipe,
            model=model_fingerprint(source.source, revision=source.revision),
            corpus=context.corpus.fingerprint,
            outside=None if context.outside is None else context.outside.fingerprint,
            split=context.corpus.named_split("validation"),
            precision=str(context.precision).removeprefix("torch."),
        )
        # Of a search that earlier versions began, candidates have the warm-up of `pretrain`.
        warmup = warmup_from_nothing(self._recipe)
        own = {} if warmup == self._recipe.pretrain.warmup else {"warmup": str(warmup)}
        return {**common, **own, "search": search_of(self._recipe).model_dump(mode="json")}

    def _require_disk(self, plan: SearchPlan) -> None:
        """All candidates of the first round wait at once, and one is cut from weights of the source's size."""
        needed = _BYTES_PER_PARAMETER * sum(candidate.shape.num_parameters() for candidate in plan.candidates)
        needed += 2 * _BYTES_PER_PARAMETER * self._source.num_parameters() - bytes_in(self.folder.path)
        free = bytes_free(self.folder.path)
        if needed > free:
            raise ShearingError(
                "--output",
                value=str(self.folder.path),
                allowed=f"{gigabytes(needed)} of free disk for {len(plan.candidates)} candidates; there are "
                f"{gigabytes(free)}",
                mend="choose an --output on another disk, or fewer candidates in search.rounds",
            )

    def _forget_failures(self, plan: SearchPlan) -> None:
        for (candidate, number), record in self._records(plan).items():
            if "failed" in record:
                self.folder.record(candidate.name, number=number).unlink()

    def _all_failed(self, plan: SearchPlan) -> ShearingError:
        first = next(record["failed"] for record in self._records(plan).values() if "failed" in record)
        return ShearingError(
            "search",
            value=f"every candidate failed, the first with: {first}",
            allowed="at least one that trains",
            mend=f"look into {self.folder.path / 'candidates'}/*/log.txt; --retry-failed runs them again",
        )


def search(settings: SearchSettings, *, console: Console | None = None) -> dict[str, Any]:
    """Search a shape in this process; what was interrupted goes on.

    Args:
        settings: what is asked for.
        console: where progress goes; stdout if None.

    Returns:
        The content of results.json, see `summarise`.

    Raises:
        ShearingError: something the user can mend.
        Interrupted: a signal asked to stop.
    """
    made = Search(settings, console=console)
    plan = made.prepare()
    made.print_plan(plan)
    made.work(plan)
    return made.finish(plan)
