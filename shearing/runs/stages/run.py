"""A whole run: its folder, the order of its stages, what is skipped and what is refused."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import transformers
from rich.console import Console

from shearing.errors import ShearingError
from shearing.files.durable import read_json, write_text
from shearing.files.refusals import said_of_file
from shearing.processes.processes import Processes
from shearing.processes.stop import StoppedAtOnce, stopping_at_once
from shearing.progress import quiet_deepspeed, reset_max_memory
from shearing.runs.context import RunContext
from shearing.runs.continuation.cascade import cascade_of
from shearing.runs.continuation.moved import as_it_lies
from shearing.runs.continuation.same_run import as_made, require_same_run
from shearing.runs.names import COMPONENT_NAMES
from shearing.runs.planning.preflight import preflight, require_cascade, require_settings
from shearing.runs.planning.summary import written_as
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory, Stage


def run(recipe: Recipe, *, stages: Sequence[Stage] | None = None, console: Console | None = None) -> RunDirectory:
    """Run `stages` in order and write the report; stages that are complete are skipped.

    A run that was interrupted anywhere continues where it was. Everything that can be checked before the first
    expensive step is checked before it. Where a launcher started several processes, each of them calls this.

    Args:
        recipe: what to do.
        stages: the stages to run, in the order of `Recipe.stages`; all of them if None.
        console: where progress goes; stdout if None. Only the main process prints.

    Returns:
        The folder of the run.

    Raises:
        ShearingError: something the user can mend; see `preflight`, `RunDirectory` and the stages.
        Interrupted, StoppedAtOnce: a signal asked to stop.
    """
    quiet_deepspeed()
    transformers.utils.logging.disable_progress_bar()  # its bars for loading weights would break the live line
    training = recipe.training
    with Processes.start(
        device=training.device, timeout=training.timeout, names=COMPONENT_NAMES, mendable=said_of_file
    ) as processes:
        if processes.is_main:
            console = console or Console()
        else:
            console = Console(quiet=True)
            logging.getLogger("shearing").setLevel(logging.CRITICAL)
            transformers.utils.logging.set_verbosity_error()
        # On one alone, before the recipe in that folder is another.
        recipe = processes.on_main(partial(as_it_lies, recipe))
        *before, last = (RunContext(each, console=console, processes=processes) for each in cascade_of(recipe))
        if before and stages is None:
            context = RunContext(recipe, console=console, processes=processes)
            processes.on_main(partial(_require_runs, context, runs=[*before, last]))
            for each in before:
                console.rule(f"[bold]cascade: {each.recipe.name}")
                _run(each, stages=[stage for stage in each.recipe.stages if stage != "evaluate"])
        return _run(last, stages=recipe.stages if stages is None else stages)


def prune(recipe: Recipe) -> RunDirectory:
    """Learn the masks; see `run`."""
    return run(recipe, stages=["prune"])


def compact(recipe: Recipe) -> RunDirectory:
    """Cut the model to the learned shape; see `run`."""
    return run(recipe, stages=["compact"])


def pretrain(recipe: Recipe) -> RunDirectory:
    """Train the cut or sparse model, or the source, on; see `run`."""
    return run(recipe, stages=["pretrain"])


def evaluate(recipe: Recipe) -> RunDirectory:
    """Measure every model of the run so far and write the report; see `run`."""
    return run(recipe, stages=["evaluate"])


def report(directory: RunDirectory) -> None:
    """Write the page about a run from what it has so far.

    Raises:
        ShearingError: no run in that folder.
    """
    if not directory.recipe.is_file():
        raise ShearingError(
            "RUN_DIR",
            value=str(directory.path),
            allowed="a folder that holds a run (recipe.yaml and the folders of its stages)",
            mend="give a recipe or the run_dir of a run that was started",
        )
    _report(directory)


def _require_runs(context: RunContext, *, runs: Sequence[RunContext]) -> None:
    """Check of the runs of a cascade what can be before the first of them; each checks the rest as it begins.

    Args:
        context: of the cascade.
        runs: of which it is.

    Raises:
        ShearingError: a run cannot be made of what it is to start from, a folder holds another, or the last could not
            be judged.
    """
    require_cascade(context)
    for each in runs:
        require_same_run(each.recipe, directory=each.directory)
    require_settings(runs[-1], stages=runs[-1].recipe.stages)


def _run(context: RunContext, *, stages: Sequence[Stage]) -> RunDirectory:
    directory, console, processes = context.directory, context.console, context.processes
    with contextlib.ExitStack() as lock:
        processes.on_main(lambda: _begin(context, stages=stages, lock=lock))
        for stage in stages:
            if stage != "evaluate" and processes.on_main(partial(directory.is_complete, stage)):
                console.print(f"[bold]{stage}[/bold] is complete: {directory.folder(stage)}")
                continue
            console.rule(f"[bold]{stage}")
            started = time.monotonic()
            try:
                # Training itself ends a step first, and writes a checkpoint.
                with stopping_at_once():
                    if stage in ("prune", "pretrain", "evaluate"):
                        _function_of(stage)(context)
                    else:
                        processes.on_main(partial(_alone, stage, context))
            except StoppedAtOnce as asked:
                if processes.size == 1:  # several say so themselves
                    console.print(f"{asked.signal}: stopped in {stage}; the same command continues", soft_wrap=True)
                raise
            console.print(f"[bold]{stage}[/bold] took {_in_words(time.monotonic() - started)}")
            _clear()
        if "evaluate" in stages:
            processes.on_main(partial(_report, directory))
    _print_summary(directory, console=console)
    return directory


def _begin(context: RunContext, *, stages: Sequence[Stage], lock: contextlib.ExitStack) -> None:
    """All that is checked before the first expensive step; the folder is locked afterwards."""
    recipe, directory = context.recipe, context.directory
    _require_stages_before(recipe, stages=stages, directory=directory)
    for note in preflight(context, stages=stages).notes:
        context.console.print(note, style="yellow", soft_wrap=True, highlight=False)
    lock.enter_context(directory.locked())
    require_same_run(recipe, directory=directory)
    for left_by_a_kill in directory.path.glob(f".{directory.recipe.name}.*"):
        left_by_a_kill.unlink()
    made, too_late = as_made(recipe, directory=directory)
    for line in too_late:
        context.console.print(line, style="yellow", soft_wrap=True, highlight=False, markup=False)
    write_text(directory.recipe, made.to_yaml())


def _alone(stage: Stage, context: RunContext) -> None:
    """A stage of the main process alone; what it returns stays there."""
    _function_of(stage)(context)


def _clear() -> None:
    """Free what a stage has left in circles of references, and begin a new peak of memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    reset_max_memory()


def _report(directory: RunDirectory) -> None:
    from shearing.runs.report.page import write_report

    write_report(directory.path)


def _function_of(stage: Stage) -> Callable[[RunContext], object]:
    # Imported one by one: evaluating needs nothing of training, and a stage's imports take seconds.
    module = importlib.import_module(f"shearing.runs.stages.{stage}")
    function: Callable[[RunContext], object] = getattr(module, stage)
    return function


def _require_stages_before(recipe: Recipe, *, stages: Sequence[Stage], directory: RunDirectory) -> None:
    """The recipe has these stages, and each that they read is complete or about to run; evaluation takes what there is.

    Raises:
        ShearingError: it has not, or one is not.
    """
    for stage in stages:
        if stage not in recipe.stages:
            raise ShearingError(
                stage,
                value=None,
                allowed=f"a stage of this recipe: {', '.join(recipe.stages)}",
                mend="add the sections target and prune, or run one of those",
            )
        needed = () if stage == "evaluate" else recipe.stages[: recipe.stages.index(stage)]
        for before in needed:
            if before not in stages:
                directory.read_complete(before)


def _print_summary(directory: RunDirectory, *, console: Console) -> None:
    console.rule("[bold]results")
    for title, path in (
        ("model after cutting", directory.compact / "config.json"),
        ("sparse model", directory.sparse / "config.json"),
        ("final model", directory.model / "config.json"),
        *((f"size {path.name}", path / "config.json") for path in sorted(directory.family.glob("*"))),
        ("with kept tokens", directory.kept_tokens / "config.json"),
        ("evaluation", directory.evaluation),
        ("report", directory.report),
        ("recipe", directory.recipe),
    ):
        if path.is_file():
            shown = path.parent if path.name == "config.json" else path
            console.print(f"{title:>20}: {shown}", soft_wrap=True, highlight=False)
    if (said := _architecture(directory)) is not None:
        console.print(f"{'architecture':>20}: {said}", soft_wrap=True, highlight=False)


def _architecture(directory: RunDirectory) -> str | None:
    """What there is to say of a cut model that is of another architecture than its source."""
    path = directory.compact / "shape.json"
    cut = read_json(path) if path.is_file() else {}
    written, instead_of = (str(cut.get(name)) for name in ("architecture", "source_architecture"))
    return None if written == instead_of else written_as(written, instead_of=instead_of)


def _in_words(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
