"""`shear search`: which shape does best at a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shearing.cli.frame import Overrides, RecipeFile, app, load
from shearing.errors import ShearingError


@app.command()
def search(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the search; unset: runs/search-NAME.")
    ] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Only say what would run.")] = False,
    processes: Annotated[
        int, typer.Option(help="Processes here that share the candidates, each with a GPU or some cores of its own.")
    ] = 1,
    join: Annotated[
        bool, typer.Option("--join", help="Take candidates of a search that another process has begun.")
    ] = False,
    keep_runs: Annotated[
        bool, typer.Option("--keep-runs", help="Keep the weights of candidates that are out.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run candidates again that have failed.")
    ] = False,
) -> None:
    """Race shapes at a budget (section `search`) by successive halving. An interrupted search continues."""
    resolved = load(recipe, overrides)
    folder = output or Path("runs") / f"search-{resolved.name}"
    from shearing.runs.search.search import Search, SearchSettings
    from shearing.runs.search.side_by_side import require_processes, run_side_by_side

    require_processes(processes)
    beside = {"--plan": only_plan, "--retry-failed": retry_failed, "--processes": processes > 1}
    if join and (given := [option for option, is_given in beside.items() if is_given]):
        raise ShearingError(
            given[0],
            value=processes if given[0] == "--processes" else True,
            allowed="nothing beside --join, which takes candidates in one process",
            mend="leave one of the two out; start --join once for each process",
        )
    settings = SearchSettings(recipe=resolved, output=folder, keep_runs=keep_runs, retry_failed=retry_failed)
    made = Search(settings)
    if join:
        made.work(made.join())
        return
    if only_plan:
        made.print_plan(made.plan())
        return
    plan = made.prepare()
    made.print_plan(plan)
    if processes == 1:
        made.work(plan)
    else:
        kept = ["--keep-runs"] if keep_runs else []
        arguments = ["search", str(recipe), *(overrides or ()), "--output", str(folder), "--join", *kept]
        if code := run_side_by_side(arguments, processes=processes):
            raise typer.Exit(code)
    made.finish(plan)
