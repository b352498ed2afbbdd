"""Tasks for one model that is of no run: asked, kept in the cache of results, and printed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from shearing.errors import ShearingError, named
from shearing.evaluation.tasks.chosen import chosen_tasks
from shearing.evaluation.tasks.figures import is_share, written
from shearing.evaluation.tasks.opening import open_harness
from shearing.files.refusals import said_of_file
from shearing.files.result_cache import Cached
from shearing.files.states import states_of
from shearing.models.stored.companions import companions
from shearing.models.stored.stored_model import STORED
from shearing.processes.processes import Processes
from shearing.progress import quiet_deepspeed
from shearing.runs.stages.evaluation.tasks import Results, task_key
from shearing.training.device import resolve_device

OPTIONS = {"tasks": "--tasks", "task_folder": "--task-folder"}


@named(OPTIONS)
def ask(
    folder: Path,
    *,
    tasks: Sequence[str] | None,
    fewshot: int | None = None,
    task_limit: int | None = None,
    task_folder: Path | None = None,
    console: Console | None = None,
) -> Results:
    """Ask a model tasks, in the precision in which it is stored, and print what it reaches.

    Args:
        folder: of a Hugging Face model of any architecture, with its tokenizer.
        tasks: of the harness, or presets.
        fewshot: examples before each question; None: as the preset or the task says.
        task_limit: questions of each task; None: all.
        task_folder: of tasks, before the harness's own.
        console: where to; stdout if None.

    Returns:
        By name of a task; see `Harness.measure`.

    Raises:
        ShearingError: no tasks, no model in the folder, or see `open_harness` and `Harness.load`.
    """
    chosen = chosen_tasks(tasks or (), fewshot=fewshot)
    if not chosen:
        raise ShearingError(
            "tasks",
            value=None,
            allowed="for a model that is of no run, at least one task",
            mend="add --tasks paper11, or the names of tasks; a run is named by its recipe or its folder",
        )
    if not (folder / "config.json").is_file():
        raise ShearingError(
            "MODEL",
            value=str(folder),
            allowed="a folder of a model (config.json) or of a run (recipe.yaml)",
            mend="correct the path",
        )
    quiet_deepspeed()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with Processes.start(mendable=said_of_file) as processes:
        console = (console or Console()) if processes.is_main else Console(quiet=True)
        harness = processes.each(lambda: open_harness(chosen, folder=task_folder))
        places = {
            task: Cached.of(
                "tasks",
                key=task_key(task, model=_state_of(folder), limit=task_limit, folder=task_folder, precision="stored"),
            )
            for task in chosen
        }
        results: Results = {}
        model: Any = None
        for task, place in places.items():
            found = processes.broadcast(place.read() if processes.is_main else None)
            if found is None:
                if model is None:
                    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
                    model.to(resolve_device("auto"))
                    tokenizer = AutoTokenizer.from_pretrained(folder)
                found = harness.measure(model, task, tokenizer=tokenizer, limit=task_limit, processes=processes)
                if processes.is_main:
                    place.write(found)
            results |= found
        console.print(_table(results, name=folder.name))
    return results


def _state_of(folder: Path) -> str:
    """Tells a model from others and from another state of it: weights, config, tokenizer and how it generates."""
    place = folder.resolve()
    weights = [path for path in place.iterdir() if path.suffix in STORED]
    beside = [place / name for name in ("config.json", *companions(place)) if not name.endswith(".md")]
    return " ".join([str(place), *states_of([*weights, *beside], within=place)])


def _table(results: Mapping[str, Mapping[str, Any]], *, name: str) -> Table:
    table = Table(title=f"{name}: tasks, ± standard error", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("task", "metric", "examples", "questions", "figure"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for task, result in results.items():
        figure = written(result) + " %" * is_share(result)
        table.add_row(task, result["metric"], str(result["fewshot"] or 0), f"{result['items']:,}", figure)
    return table
