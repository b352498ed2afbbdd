"""`shear allocate`: the choice of levels alone, in a file that any later run of `shear sparsify` can use."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table

from shearing.errors import ShearingError
from shearing.run_directory import locked, read_json, require_writable, write_json
from shearing.sparsity.allocation import units_of
from shearing.sparsity.allocation.choose import choose_levels
from shearing.sparsity.allocation.file import FILE_NAME, StoredAllocation
from shearing.sparsity.allocation.picture import draw_allocation
from shearing.sparsity.job import Job, prepare, require_same
from shearing.sparsity.recipe import SparsifyRecipe


def allocate(recipe: SparsifyRecipe, *, console: Console | None = None) -> Path:
    """Choose a level for every matrix and write the choice, with a picture beside it.

    The same call after an interruption continues it. A file that is there already is never replaced.

    Args:
        recipe: what to do; `output` is the file.
        console: where progress and results go; stdout if None.

    Returns:
        The file.

    Raises:
        ShearingError: something the user can mend.
    """
    console = console or Console()
    transformers.utils.logging.disable_progress_bar()
    output = recipe.output
    if output.suffix != ".json" or output.exists():
        raise ShearingError(
            "output",
            value=str(output),
            allowed="a file that does not exist yet and ends in .json",
            mend=f"write -o {output.with_suffix('') / FILE_NAME}",
        )
    require_writable(output.parent, field="output")
    partial = output.with_name(f"{output.name}.partial")
    job = prepare(recipe, folder=partial)
    with locked(partial, field="output"):
        settings = partial / "settings.json"
        if settings.is_file():
            require_same(read_json(settings), job.settings, where=partial)
        else:
            write_json(settings, job.settings)
        started = time.monotonic()
        allocation = choose_levels(recipe, job=job, console=console)
        write_json(output, dict(allocation.content))
    shutil.rmtree(partial)
    picture = output.with_suffix(".png")
    draw_allocation(allocation, path=picture)
    console.print(_summary(recipe, allocation, job=job, seconds=time.monotonic() - started))
    console.print(f"allocation: {output}\npicture: {picture}", soft_wrap=True, highlight=False)
    return output


def _summary(recipe: SparsifyRecipe, allocation: StoredAllocation, *, job: Job, seconds: float) -> Table:
    table = Table(title="allocate complete", show_header=False, title_justify="left")
    units = units_of(job.matrices, unit=recipe.unit)
    counts = Counter(allocation.patterns[unit.matrices[0].name] for unit in units)
    table.add_row("allocation", f"{allocation.content['allocation']}, for {recipe.criterion}")
    table.add_row("sparsity", f"{100 * float(1 - allocation.budget):.2f} % of the matrices")
    what = "layers" if recipe.unit == "block" else "matrices"
    table.add_row(what, ", ".join(f"{counts[level]} at {level}" for level in job.levels if counts[level]))
    facts = allocation.content["facts"]
    if "fitness" in facts:
        table.add_row("fitness", ", ".join(f"{name} {value:.4f}" for name, value in facts["fitness"].items()))
    table.add_row("time", f"{seconds:.1f} s")
    return table
