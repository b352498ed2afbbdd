"""Tasks of the lm-evaluation-harness for the models of a run, shared out over its processes; each figure kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from shearing.errors import named
from shearing.evaluation.environment import version_of
from shearing.evaluation.tasks.chosen import ChosenTask, chosen_tasks
from shearing.evaluation.tasks.figures import in_words
from shearing.evaluation.tasks.opening import open_harness
from shearing.files.result_cache import Cached
from shearing.files.states import states_of
from shearing.models.stored.paging.on_demand import weights_here
from shearing.processes.processes import Processes
from shearing.progress import activity
from shearing.runs.context import RunContext
from shearing.runs.names import EVALUATION_NAMES
from shearing.runs.stages.evaluation.kept import kept
from shearing.runs.stages.evaluation.rows import Row, is_shared_out

if TYPE_CHECKING:
    from shearing.evaluation.tasks.harness import Harness

Results = dict[str, dict[str, Any]]
"""Of tasks, by name; see `Harness.measure`."""


def measure_tasks(context: RunContext, rows: Sequence[Row], *, results: dict[str, dict[str, Any]]) -> None:
    """Add `tasks` to the results of the source and of the run's own models, baselines only where the recipe says so.

    All processes call this; each answers its share of the questions.

    Args:
        context: of the run.
        rows: its models.
        results: by the names of rows; on the main process.

    Raises:
        ShearingError: see `open_harness` and `Harness.load`.
    """
    settings, processes = context.recipe.evaluation, context.processes
    asked = [row for row in rows if row.of_run or settings.task_baselines]
    missing = processes.on_main(lambda: _read_kept(context, asked, results=results))
    if not missing:
        return
    with named(EVALUATION_NAMES):
        harness = processes.each(lambda: open_harness(chosen_tasks(settings.tasks), folder=settings.task_folder))
    loads = {row.name: row for row in asked}
    total = sum(loads[name].shape.num_parameters() * len(tasks) for name, tasks in missing.items())
    with activity(f"tasks of {len(missing)} models", total=total, console=context.console) as advance:
        for name, tasks in missing.items():
            row = loads[name]
            # Questions are many and short: each process answers its own with all of the model at hand.
            model = row.load_shared() if is_shared_out(context, row) else row.load()
            with weights_here(model):
                for task in tasks:
                    found = measure_task(context, model, task, harness=harness, processes=processes)
                    if processes.is_main:
                        place_of(context, task, fingerprint=row.fingerprint).write(found)
                        results[name]["tasks"] |= found
                    advance(row.shape.num_parameters())
            del model  # before the next one is loaded
            if processes.is_main:
                context.console.print(f"{row.label}: {in_words(results[name]['tasks'])}", highlight=False)


@named(EVALUATION_NAMES)
def measure_task(
    context: RunContext, model: PreTrainedModel, task: ChosenTask, *, harness: Harness, processes: Processes
) -> Results:
    """Ask a model of a run a task; see `Harness.measure`."""
    settings = context.recipe.evaluation
    return harness.measure(
        model,
        task,
        tokenizer=context.tokenizer,
        limit=settings.task_limit,
        batch_size=settings.task_batch_size,
        precision=context.precision,
        processes=processes,
    )


def place_of(context: RunContext, task: ChosenTask, *, fingerprint: str) -> Cached:
    """Where the figures of a model on a task are kept."""
    settings = context.recipe.evaluation
    key = task_key(
        task,
        model=fingerprint,
        limit=settings.task_limit,
        folder=settings.task_folder,
        precision=str(context.precision),
    )
    return kept(context.directory, kind="task", key=key)


def task_key(task: ChosenTask, *, model: str, limit: int | None, folder: Path | None, precision: str) -> dict[str, Any]:
    """All that a figure on a task depends on.

    Args:
        task: and how it is asked.
        model: its fingerprint.
        limit: questions.
        folder: of tasks; its files count by name, size and time.
        precision: of matrix products.
    """
    files = [] if folder is None else [path for path in folder.rglob("*") if path.is_file()]
    return {
        "model": model,
        "task": task.name,
        "fewshot": task.fewshot,
        "metric": task.metric,
        "limit": limit,
        "folder": None if folder is None else states_of(files, within=folder),
        "precision": precision,
        "lm_eval": version_of("lm_eval"),
    }


def _read_kept(
    context: RunContext, rows: Sequence[Row], *, results: dict[str, dict[str, Any]]
) -> dict[str, list[ChosenTask]]:
    """Fill in what is known; what is missing, by the names of rows."""
    settings = context.recipe.evaluation
    missing: dict[str, list[ChosenTask]] = {}
    for row in rows:
        results[row.name]["tasks"] = {}
        for task in chosen_tasks(settings.tasks, fewshot=settings.fewshot):
            known = place_of(context, task, fingerprint=row.fingerprint).read()
            if known is None:
                missing.setdefault(row.name, []).append(task)
            else:
                results[row.name]["tasks"] |= known
    return missing
