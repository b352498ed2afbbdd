"""`shear run`, its stages, and what is asked of a recipe before and after: plan, config, launch, report."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.syntax import Syntax

from shearing.cli.frame import Overrides, RecipeFile, app, config, load
from shearing.errors import CombinedShearingError, ShearingError
from shearing.processes.launcher import launcher_guard
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory, Stage
from shearing.settings.quantities import DURATION_FORMS, Duration

_TIME, _LOG, _LEAD_SECONDS = "24:00:00", "slurm-%j.out", 300
"""Of a Slurm job, unless said otherwise."""


def _slurm(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="With --slurm")


Gpus = Annotated[
    str | None,
    typer.Option(help="Processes to start here, one on each GPU: a number, or all. Unset: one, or as a launcher says."),
]


@app.command("run")
def run_all(recipe: RecipeFile, overrides: Overrides = None, gpus: Gpus = None) -> None:
    """Run all stages: prune, compact, sparsify, pretrain, eval, report. An interrupted run continues."""
    _run(recipe, overrides, command="run", stages=None, gpus=gpus)


@app.command()
def prune(recipe: RecipeFile, overrides: Overrides = None, gpus: Gpus = None) -> None:
    """Learn the masks."""
    _run(recipe, overrides, command="prune", stages=["prune"], gpus=gpus)


@app.command()
def compact(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Cut the model to the learned shape."""
    _run(recipe, overrides, command="compact", stages=["compact"])


@app.command()
def pretrain(recipe: RecipeFile, overrides: Overrides = None, gpus: Gpus = None) -> None:
    """Train the cut or sparse model on, or the source itself."""
    _run(recipe, overrides, command="pretrain", stages=["pretrain"], gpus=gpus)


@app.command("eval")
def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RECIPE|RUN_DIR|MODEL", help="A folder of a model: tasks alone.")],
    overrides: Overrides = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of the lm-evaluation-harness, with commas between; paper11: the paper's.")
    ] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task; unset: all.")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder of tasks, before the harness's own.")] = None,
    gpus: Gpus = None,
) -> None:
    """Measure every model of the run so far and its baselines; or ask one model tasks."""
    of_run = RunDirectory(target).recipe
    names = None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    if target.is_dir() and not of_run.is_file():
        _ask(target, overrides, tasks=names, fewshot=fewshot, task_limit=limit, task_folder=task_folder, gpus=gpus)
        return
    given = {"tasks": names, "fewshot": fewshot, "task_limit": limit, "task_folder": task_folder}
    asked = [f"evaluation.{key}={json.dumps(value, default=str)}" for key, value in given.items() if value is not None]
    if target.is_dir():
        asked.append(f"run_dir={json.dumps(str(target))}")  # wherever it was made
    path = of_run if target.is_dir() else target
    _run(path, [*(overrides or ()), *asked], command="eval", stages=["evaluate"], gpus=gpus)


@app.command()
def extend(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run with continued pretraining.")],
    to: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NEW_DIR] [KEY=VALUE]…",
            help="Folder of a new run, RUN_DIR is only read then; without it the run goes on where it is. Then dotted "
            "keys over its recipe: pretrain.duration='200 steps'.",
        ),
    ] = None,
    decay: Annotated[
        str | None, typer.Option(help="End in a decay of this length, as '100 steps', that begins there.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--from", help="Step of the checkpoint; unset: the newest that can be.")
    ] = None,
    onward: Annotated[
        bool,
        typer.Option(
            "--onward",
            help="With NEW_DIR: from the newest checkpoint, whatever the rates were until there, as without NEW_DIR.",
        ),
    ] = False,
) -> None:
    """Train a run for longer, with another rate or a decay, from a checkpoint on: where it is, or in another folder.

    Where it is (and with --onward), it goes on from the newest checkpoint, and what was before it stays as it was. A
    new run begins at the newest checkpoint until which it is the run that had the new recipe from the start.
    """
    from shearing.runs.continuation.extension import change, extend as begin

    run, given = RunDirectory(run_dir), list(to or ())
    new_dir = Path(given.pop(0)) if given and "=" not in given[0] else None
    length = None if decay is None else _duration(decay, field="--decay")
    if new_dir is None:
        if step is not None:
            raise ShearingError(
                "--from",
                value=step,
                allowed="with NEW_DIR: a run that stays where it is goes on from its newest checkpoint",
                mend="name a folder for a new run, with --onward to keep the rates until there as they were",
            )
        made = change(run, decay=length, overrides=given)
    else:
        made = begin(run, to=new_dir, decay=length, step=step, overrides=given, onward=onward)
    of = "" if new_dir is None else f", from {run_dir}"
    typer.echo(
        f"{made.directory.path}: step {made.step} of {made.total_steps} of pretrain{of}; it goes on by its own recipe"
    )
    typer.echo(f"shear run {made.directory.recipe}")


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="Processes, one on each GPU; unset: the GPUs here, or 1.")] = None,
    gpu: Annotated[str | None, typer.Option(help="What kind, as H100 or A100-SXM4-80GB; unset: the one here.")] = None,
    memory: Annotated[float | None, typer.Option(help="GB of one GPU; unset: as its kind has.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the GPU's peak that training reaches.")] = 0.4,
    steps: Annotated[bool, typer.Option("--steps", help="Everything the run does, one after the other.")] = False,
) -> None:
    """Say what the run will take: memory for each way to share it out, FLOPs, time, disk. Loads no weights."""
    resolved = load(recipe, overrides)
    from shearing.runs.continuation.moved import as_it_lies
    from shearing.runs.planning.hardware import Hardware
    from shearing.runs.planning.phases import phases
    from shearing.runs.planning.plan import plans
    from shearing.runs.planning.plan_tables import render, render_phases, render_totals

    hardware = Hardware.of(processes=gpus, gpu=gpu, gigabytes=memory, mfu=mfu)
    console, runs = Console(), plans(as_it_lies(resolved), hardware=hardware)
    for number, (each, made) in enumerate(runs, start=1):
        if len(runs) > 1:
            console.rule(f"[bold]cascade: {each.name}")
        found = phases(each, made=made, evaluates=number == len(runs)) if steps else []
        console.print(render_phases(made, phases=found) if steps else render(made))
    if len(runs) > 1:
        console.print("", render_totals([made for _, made in runs]))
    if resolved.search is not None:
        from shearing.runs.search.pricing import price

        console.print("", price(resolved, hardware=hardware))


@app.command()
def report(target: Annotated[Path, typer.Argument(metavar="RECIPE|RUN_DIR")], overrides: Overrides = None) -> None:
    """Write report.html from what the run has so far."""
    from shearing.runs.stages.run import report as write

    directory = RunDirectory(target if target.is_dir() else load(target, overrides).run_dir)
    write(directory)
    Console().print(str(directory.report), soft_wrap=True, highlight=False)


@app.command()
def launch(
    recipe: RecipeFile,
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Print the script of a Slurm job.")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="Submit it instead and print its number.")] = False,
    nodes: Annotated[int, typer.Option(help="Nodes.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs, and so processes, on each: the GPUs of this machine; with --slurm, 8.")
    ] = None,
    time: Annotated[str, _slurm("Time limit of one start of the job; a longer run is queued again.")] = _TIME,
    partition: Annotated[str | None, _slurm("Partition.")] = None,
    account: Annotated[str | None, _slurm("Account.")] = None,
    qos: Annotated[str | None, _slurm("Quality of service.")] = None,
    cpus_per_task: Annotated[int | None, _slurm("CPU cores of each process.")] = None,
    mem: Annotated[str | None, _slurm("Memory of each node.")] = None,
    name: Annotated[str | None, _slurm("Name of the job; from the recipe if unset.", "--job-name")] = None,
    output: Annotated[str, _slurm("Log of the job.")] = _LOG,
    signal_before: Annotated[int, _slurm("Seconds before the limit at which the run saves and stops.")] = _LEAD_SECONDS,
    directives: Annotated[
        list[str] | None,
        _slurm(
            "Any other option of sbatch, KEY=VALUE or KEY; may be repeated. Requeueing and open-mode are set.",
            "--sbatch",
        ),
    ] = None,
    setup: Annotated[
        list[str] | None, _slurm("Shell line to run before, as 'module load cuda'; may be repeated.")
    ] = None,
    python: Annotated[str | None, _slurm("Interpreter on the nodes; the one that runs now if unset.")] = None,
) -> None:
    """Start a recipe on many processes: print what to type, or a Slurm job that continues until the run is complete."""
    from shearing.runs import launch as launching

    resolved = load(recipe, overrides)
    if not slurm:
        launching.require_slurm(
            {
                "--submit": submit,
                "--time": time != _TIME and time,
                "--partition": partition,
                "--account": account,
                "--qos": qos,
                "--cpus-per-task": cpus_per_task,
                "--mem": mem,
                "--job-name": name,
                "--output": output != _LOG and output,
                "--signal-before": signal_before != _LEAD_SECONDS and signal_before,
                "--sbatch": directives,
                "--setup": setup,
                "--python": python,
            }
        )
        processes = launching.gpus_here() if gpus_per_node is None else gpus_per_node
        text = launching.commands(recipe, overrides=overrides or (), nodes=nodes, processes=processes)
        launching.require_equal_shares(resolved, num_processes=nodes * processes)
        typer.echo(text, nl=False)
        return
    job = launching.SlurmJob(
        name=name or launching.job_name(resolved),
        nodes=nodes,
        gpus_per_node=launching.GPUS_PER_NODE if gpus_per_node is None else gpus_per_node,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        cpus_per_task=cpus_per_task,
        mem=mem,
        output=output,
        signal_before=signal_before,
        directives=directives or (),
        setup=setup or (),
        python=python,
    )
    script = launching.slurm_script(
        job, recipe=recipe, overrides=overrides or (), folder=Path.cwd(), gpus=resolved.training.device != "cpu"
    )
    launching.require_equal_shares(resolved, num_processes=job.nodes * job.gpus_per_node)
    typer.echo(launching.submit(script, job=job) if submit else script, nl=submit)


@config.command()
def show(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Print the fully resolved recipe, each key documented."""
    _print_source(load(recipe, overrides).to_yaml(), language="yaml")


@config.command()
def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check everything that can be checked without loading weights, and say what the run will do.

    What is known is said also where something is missing, as a corpus that is not here; the errors are last.
    """
    resolved = load(recipe, overrides)
    from shearing.runs.context import RunContext
    from shearing.runs.continuation.cascade import cascade_of
    from shearing.runs.continuation.moved import as_it_lies
    from shearing.runs.continuation.same_run import require_same_run
    from shearing.runs.planning.preflight import survey
    from shearing.runs.planning.summary import render

    here = as_it_lies(resolved)
    found, errors = survey(RunContext(here), starts=False)
    try:
        for each in cascade_of(here):
            require_same_run(each, directory=RunDirectory(each.run_dir))
    except ShearingError as error:
        errors.append(error)
    if found is not None:
        Console().print(render(found))
    if errors or found is None:
        raise CombinedShearingError(errors)
    doubtful = " but what is said above" if found.doubts or found.notes else ""
    command = shlex.join(["shear", "run" if found.uniform else "prune", str(recipe), *(overrides or ())])
    typer.echo(f"nothing wrong{doubtful}: {command}")


@config.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    _print_source(json.dumps(Recipe.model_json_schema(), indent=2), language="json")


def _ask(folder: Path, overrides: Sequence[str] | None, *, gpus: str | None, **settings: Any) -> None:
    """Ask a model without a run the tasks of the options."""
    beyond = "KEY=VALUE" if overrides else "--gpus" if gpus else None
    if beyond:
        raise ShearingError(
            beyond,
            value=gpus if beyond == "--gpus" else list(overrides or ()),
            allowed=f"{beyond} with a recipe or the folder of a run; {folder} holds no recipe.yaml",
            mend="leave it out; on many GPUs: torchrun --nproc-per-node N -m shearing eval …",
        )
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from shearing.runs.stages.evaluation.alone import ask

    ask(folder, **settings)


def _duration(text: str, *, field: str) -> Duration:
    try:
        return Duration.parse(text)
    except ValueError as error:
        raise ShearingError(field, value=text, allowed=DURATION_FORMS, mend=str(error)) from None


def _run(
    path: Path,
    overrides: Sequence[str] | None,
    *,
    command: str,
    stages: Sequence[Stage] | None,
    gpus: str | None = None,
) -> None:
    launcher_guard()
    # The recipe first: what is wrong with it should not wait for torch.
    try:
        recipe = load(path, overrides)
    except ShearingError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        # The first process of the host says it; a launcher would kill that one as soon as this one has ended.
        time.sleep(2)
        raise typer.Exit(2) from None
    if gpus is not None:
        from shearing.runs import launch as launching

        processes = launching.processes_here(recipe, wanted=gpus, stages=stages)
        if processes > 1:
            code = launching.run_here([command, str(path), *(overrides or ())], processes=processes)
            raise typer.Exit(code)
    # Before torch: its C++ warnings of a lost connection come with a page of frames, ahead of our own message.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from shearing.runs.stages.run import run

    run(recipe, stages=stages)


def _print_source(text: str, *, language: str) -> None:
    console = Console()
    if console.is_terminal:
        console.print(Syntax(text, language, background_color="default"))
    else:
        typer.echo(text, nl=False)
