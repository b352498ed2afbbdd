"""A whole run: its folder, the order of its stages, what is skipped and what is refused."""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import transformers
from rich.console import Console

from shearing.errors import ShearingError
from shearing.files.durable import write_text
from shearing.processes.processes import Processes
from shearing.runs.context import RunContext
from shearing.runs.planning.preflight import preflight
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory, Stage
from shearing.settings.reading import read_recipe_file

# Keys that change how a run is kept, watched or spread over processes, never what it computes beyond rounding.
_NEUTRAL_KEYS = frozenset(
    {
        "name",
        "run_dir",
        "resume",
        "prune.micro_batch_size",
        "prune.keep_last",
        "prune.keep_every",
        "prune.checkpoint_interval",
        "sparsify.micro_batch_size",
        "sparsify.offload",
        "pretrain.micro_batch_size",
        "pretrain.keep_last",
        "pretrain.keep_every",
        "pretrain.checkpoint_interval",
        "training.log_interval",
        "training.engine",
        "training.activation_checkpointing",
        "training.compile",
        "training.device",
        "training.loss_chunk_tokens",
        "training.trackers",
        "training.timeout",
    }
)
_NEUTRAL_SECTIONS = ("evaluation.", "training.deepspeed.")


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
    """
    # transformers imports DeepSpeed where it is installed, which says on every machine without a GPU that it has none.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())
    transformers.utils.logging.disable_progress_bar()  # its bars for loading weights would break the live line
    with Processes.start(device=recipe.training.device, timeout=recipe.training.timeout) as processes:
        if processes.is_main:
            console = console or Console()
        else:
            console = Console(quiet=True)
            logging.getLogger("shearing").setLevel(logging.CRITICAL)
            transformers.utils.logging.set_verbosity_error()
        context = RunContext(recipe, console=console, processes=processes)
        return _run(context, stages=recipe.stages if stages is None else stages)


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
            if stage in ("prune", "pretrain"):
                _function_of(stage)(context)
            else:
                processes.on_main(partial(_alone, stage, context))
            console.print(f"[bold]{stage}[/bold] took {_in_words(time.monotonic() - started)}")
        if "evaluate" in stages:
            processes.on_main(partial(_report, directory))
    _print_summary(directory, console=console)
    return directory


def _begin(context: RunContext, *, stages: Sequence[Stage], lock: contextlib.ExitStack) -> None:
    """All that is checked before the first expensive step; the folder is locked afterwards."""
    recipe, directory = context.recipe, context.directory
    _require_stages_before(recipe, stages=stages, directory=directory)
    preflight(context, stages=stages)
    lock.enter_context(directory.locked())
    _require_same_run(recipe, directory=directory)
    for left_by_a_kill in directory.path.glob(f".{directory.recipe.name}.*"):
        left_by_a_kill.unlink()
    write_text(directory.recipe, recipe.to_yaml())


def _alone(stage: Stage, context: RunContext) -> None:
    _function_of(stage)(context)


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


def _require_same_run(recipe: Recipe, *, directory: RunDirectory) -> None:
    if not directory.recipe.is_file():
        return
    if recipe.resume == "never":
        raise ShearingError(
            "run_dir",
            value=str(directory.path),
            allowed="with resume=never, a folder that holds no run",
            mend="choose another run_dir, remove the folder, or set resume=auto to continue that run",
        )
    earlier = _flat(read_recipe_file(directory.recipe, overrides=())[0])
    now = _flat(recipe.model_dump(mode="json"))
    changed = sorted(
        key
        for key in earlier.keys() | now.keys()
        if earlier.get(key) != now.get(key) and _is_settled(key, directory=directory)
    )
    if changed:
        raise ShearingError(
            "run_dir",
            value=str(directory.path),
            allowed="a folder without a run, or with a run of this recipe; what differs from its recipe.yaml: "
            + "; ".join(f"{key} was {earlier.get(key)!r} and is {now.get(key)!r}" for key in changed),
            mend="choose another run_dir, or take those values back to continue that run",
        )


def _is_settled(key: str, *, directory: RunDirectory) -> bool:
    """Whether the run has already used the value of `key`."""
    section = key.partition(".")[0]
    if key in _NEUTRAL_KEYS or key.startswith(_NEUTRAL_SECTIONS):
        return False
    if section == "pretrain" or key == "mixture.pretrain_interval":
        return directory.pretrain.exists()
    if section == "sparsify":
        return directory.sparsify.exists() or directory.pretrain.exists()
    return any(folder.exists() for folder in (directory.prune, directory.sparsify, directory.pretrain))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix.rstrip("."): value}
    return {key: leaf for name, below in value.items() for key, leaf in _flat(below, f"{prefix}{name}.").items()}


def _print_summary(directory: RunDirectory, *, console: Console) -> None:
    console.rule("[bold]results")
    for title, path in (
        ("model after cutting", directory.compact / "config.json"),
        ("sparse model", directory.sparse / "config.json"),
        ("final model", directory.model / "config.json"),
        ("evaluation", directory.evaluation),
        ("report", directory.report),
        ("recipe", directory.recipe),
    ):
        if path.is_file():
            shown = path.parent if path.name == "config.json" else path
            console.print(f"{title:>20}: {shown}", soft_wrap=True, highlight=False)


def _in_words(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
