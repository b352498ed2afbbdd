"""`shear compare`: a race, from its plan to its tables; killed anywhere, the same command goes on where it was."""

from __future__ import annotations

import logging
import os
import shutil
from typing import Any

import transformers
from rich.console import Console

from shearing.errors import ShearingError, named
from shearing.evaluation.environment import environment
from shearing.files.durable import locked, require_writable, write_json, write_text
from shearing.progress import clock
from shearing.runs.context import RunContext
from shearing.runs.names import COMPONENT_NAMES
from shearing.runs.race.judging import SPLIT
from shearing.runs.race.plan import RacePlan, plan as make_plan
from shearing.runs.race.records import (
    RaceFolder,
    Record,
    fingerprint,
    model_fingerprint,
    read_record,
    require_same_race,
    settings_of,
)
from shearing.runs.race.results.picture import draw_race
from shearing.runs.race.results.summary import summarise
from shearing.runs.race.results.tables import markdown_tables, plan_table, rich_tables
from shearing.runs.race.rows import RaceSettings, Row
from shearing.runs.race.running import keep_model, run_row
from shearing.runs.recipe import Recipe

OF_THE_FOLDER = ("run_dir", "folder", "--output")
"""Fields of errors that are no row's fault: a full disk, another process."""


@named(COMPONENT_NAMES)
def compare(settings: RaceSettings, *, console: Console | None = None, only_plan: bool = False) -> dict[str, Any]:
    """Run every row of a race that is not there yet, and write and print its tables.

    Args:
        settings: what is asked for.
        console: where progress goes; stdout if None.
        only_plan: print what would run, and run nothing.

    Returns:
        The content of results.json, see `summarise`.

    Raises:
        ShearingError: something the user can mend; before any row runs, but for a full disk.
        Interrupted: a signal asked to stop; the row's checkpoint is written.
    """
    console = console or Console()
    _require_one_process()
    require_writable(settings.output, field="--output")
    # Its bars for loading weights would break the live line.
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)

    def make_context(recipe: Recipe) -> RunContext:
        return RunContext(recipe, console=console)

    plan = make_plan(settings, make_context=make_context)
    race = _Race(settings, plan=plan, console=console)
    common = race.settings_of(settings.recipe, common=True)
    if only_plan:
        if race.folder.settings.is_file():  # a plan alone begins no race
            require_same_race(race.folder, settings=common)
        race.print_plan()
        return race.results()
    with locked(settings.output, field="--output"):
        require_same_race(race.folder, settings=common)
        race.print_plan()
        race.run()
    console.print(rich_tables(race.results()))
    console.print(
        f"rows: {settings.output / 'rows'}; tables: {race.folder.tables}; picture: {race.folder.picture}",
        soft_wrap=True,
        highlight=False,
    )
    return race.results()


class _Race:
    """The rows of a plan and what has become of them."""

    def __init__(self, settings: RaceSettings, *, plan: RacePlan, console: Console) -> None:
        self.folder = RaceFolder(path=settings.output)
        self._settings, self._plan, self._console = settings, plan, console
        context = RunContext(settings.recipe, console=console)
        source = settings.recipe.model
        self._model = model_fingerprint(source.source, revision=source.revision)
        self._corpus, self._split = context.corpus.fingerprint, context.corpus.named_split(SPLIT)
        self._outside = None if context.outside is None else context.outside.fingerprint
        self._precision = str(context.precision).removeprefix("torch.")
        self._environment = environment(context.device)
        self._fingerprints = {
            row: fingerprint(row, settings=self.settings_of(recipe)) for row, recipe in plan.recipes.items()
        }
        self._records = {row: record for row in plan.rows if (record := self._read(row)) is not None}

    def settings_of(self, recipe: Recipe, *, common: bool = False) -> dict[str, Any]:
        """What figures depend on; what all rows have in common has no seed."""
        found = settings_of(
            recipe,
            model=self._model,
            corpus=self._corpus,
            outside=self._outside,
            split=self._split,
            precision=self._precision,
        )
        return {key: value for key, value in found.items() if not (common and key == "seed")}

    def run(self) -> None:
        """Every row that is missing, in order; the tables are written after each, the picture in the end."""
        missing = [row for row in self._plan.rows if row not in self._records]
        for index, row in enumerate(missing):
            left = self._seconds_of(missing[index:])
            self._console.rule(
                f"[bold]{row.contender.title}[/], seed {row.seed}, {row.steps} steps · row "
                f"{len(self._plan.rows) - len(missing) + index + 1} of {len(self._plan.rows)}"
                + ("" if left is None else f" · {clock(left)} left")
            )
            record = self._run(row)
            write_json(self.folder.row(row), record)
            self._records[row] = record
            self._say(record)
            shutil.rmtree(self.folder.run(row), ignore_errors=True)
            if not any(other.cut_name == row.cut_name for other in missing[index + 1 :]):
                shutil.rmtree(self.folder.cut(row), ignore_errors=True)
            self._write_tables()
        self._write_tables()
        draw_race(self.results(), path=self.folder.picture)
        for emptied in ("work", "cuts"):
            shutil.rmtree(self.folder.path / emptied, ignore_errors=True)

    def results(self) -> dict[str, Any]:
        """The tables as values."""
        found = summarise(self._plan, equal=self._settings.equal, records=self._records)
        return {**found, "split": self._split, "environment": self._environment}

    def print_plan(self) -> None:
        """What will run."""
        missing = [row for row in self._plan.rows if row not in self._records]
        done = len(self._plan.rows) - len(missing)
        flops = self._plan.left(missing, folder=self.folder)
        self._console.print(plan_table(self._plan, done=done, flops=flops, seconds=self._seconds_of(missing)))

    def _run(self, row: Row) -> Record:
        """What becomes of a row; a method that fails is a result too."""
        context = RunContext(self._plan.recipes[row], console=self._console)
        head = {"fingerprint": self._fingerprints[row], "method": row.contender.method, "title": row.contender.title}
        try:
            record = run_row(row, context=context, folder=self.folder, flops=self._plan.flops[row])
            if self._settings.keep_models:
                keep_model(context, place=self.folder.model(row))
        except OSError:
            raise
        except ShearingError as error:
            if error.field.partition(" ")[0] in OF_THE_FOLDER:
                raise
            return {**head, "failed": self._reason(error)}
        except Exception as error:  # noqa: BLE001 - whatever a method does, the race goes on and says so
            return {**head, "failed": self._reason(error)}
        return {**head, **record}

    def _reason(self, error: Exception) -> str:
        """An error in a line, without places."""
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return line.replace(f"{self._settings.output}{os.sep}", "")

    def _read(self, row: Row) -> Record | None:
        record = read_record(self.folder.row(row), expected=self._fingerprints[row])
        failed = record is not None and "failed" in record
        return None if failed and self._settings.retry_failed else record

    def _seconds_of(self, rows: list[Row]) -> float | None:
        """What rows will take, by the pace of those that have ended."""
        ended = [(row, record) for row, record in self._records.items() if "failed" not in record]
        if not ended:
            return None
        flops = sum(self._plan.flops[row].total for row, _ in ended)
        seconds = sum(float(sum(record["seconds"].values())) for _, record in ended)
        return seconds / flops * self._plan.left(rows, folder=self.folder)

    def _say(self, record: Record) -> None:
        if "failed" in record:
            self._console.print(f"[bold red]failed[/]: {record['failed']}", highlight=False)
            return
        losses = record["losses"]
        after = losses["after_cutting"]["mean"]
        trained = f", after {record['tokens']:,} tokens {losses['final']['mean']:.3f}" if "final" in losses else ""
        self._console.print(
            f"loss right after cutting {'not finite' if after is None else f'{after:.3f}'}{trained}; "
            f"{record['flops']['total']:.2e} FLOPs, {clock(sum(record['seconds'].values()))}",
            highlight=False,
        )

    def _write_tables(self) -> None:
        results = self.results()
        write_json(self.folder.results, results)
        write_text(self.folder.tables, markdown_tables(results))


def _require_one_process() -> None:
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise ShearingError(
            "WORLD_SIZE (environment)",
            value=size,
            allowed="1: a race runs its rows one after the other in one process",
            mend="start `shear compare` without torchrun; other seeds or methods may run at the same time in another "
            "--output",
        )
