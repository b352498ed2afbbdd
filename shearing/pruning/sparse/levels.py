"""The level of every matrix: read from a file or chosen by an allocation, which `shear allocate` does alone."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table

from shearing.errors import ShearingError, named
from shearing.files.durable import locked, read_json, require_writable, write_json
from shearing.files.full_disk import full_disk_said
from shearing.pruning.sparse.allocation.allocator import Allocator, Request, require_fit, units_of
from shearing.pruning.sparse.allocation.file import FILE_NAME, StoredAllocation, read_allocation, write_allocation
from shearing.pruning.sparse.allocation.picture import draw_allocation
from shearing.pruning.sparse.allocation.rules.alpha import Alpha
from shearing.pruning.sparse.allocation.rules.depth import Depth
from shearing.pruning.sparse.allocation.rules.hessian import HessianRank
from shearing.pruning.sparse.allocation.rules.owl import Owl
from shearing.pruning.sparse.allocation.rules.rank import Rank
from shearing.pruning.sparse.allocation.rules.redundancy import Redundancy
from shearing.pruning.sparse.allocation.rules.uniform import Uniform
from shearing.pruning.sparse.job import Job, gather, no_room, prepare, require_same, working
from shearing.pruning.sparse.recipe import COMPONENT_NAMES, SparsifyRecipe
from shearing.pruning.sparse.search.evolution import SearchSettings
from shearing.pruning.sparse.search.fitness import Training
from shearing.pruning.sparse.search.msp import LEVELS, Msp


@named(COMPONENT_NAMES)
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
    room = "what is found of each layer, until levels are chosen"
    with locked(partial, field="output"), full_disk_said(lambda: no_room(partial, what=room)):
        settings = partial / "settings.json"
        if settings.is_file():
            require_same(read_json(settings), job.settings, where=partial)
        else:
            needed = working(job).most()
            if shutil.disk_usage(partial).free < needed:
                raise no_room(partial, what=f"{needed / 1e9:.2f} GB: {room}")
            write_json(settings, job.settings)
        started = time.monotonic()
        gather(job, console=console)
        allocation = choose_levels(recipe, job=job, console=console)
        write_json(output, dict(allocation.content))
    shutil.rmtree(partial)
    picture = output.with_suffix(".png")
    draw_allocation(allocation, path=picture)
    console.print(_summary(recipe, allocation, job=job, seconds=time.monotonic() - started))
    console.print(f"allocation: {output}\npicture: {picture}", soft_wrap=True, highlight=False)
    return output


def choose_levels(recipe: SparsifyRecipe, *, job: Job, console: Console) -> StoredAllocation:
    """The level of every matrix, from a file or from the recipe's rule.

    Args:
        recipe: what to do.
        job: what is known of it; the choice is kept in its folder.
        console: for progress.

    Raises:
        ShearingError: the levels cannot be mixed to the budget, or what the rule reads is not finite.
    """
    path = job.compute.folder / FILE_NAME
    if job.allocation is not None:
        return job.allocation
    if path.is_file():
        _let_go(job)
        return read_allocation(path, source=job.source)
    if job.budget != job.asked:
        console.print(
            f"levels cannot be mixed to {100 * float(1 - job.asked):g} % exactly; the nearest is "
            f"{100 * float(1 - job.budget):.4f} %",
            highlight=False,
        )
    allocation = allocator_of(recipe, job=job).allocate(request_of(recipe, job=job, console=console))
    require_fit(allocation.patterns, matrices=job.matrices, budget=job.budget)
    stored = write_allocation(
        path,
        patterns=allocation.patterns,
        matrices=job.matrices,
        source=job.source,
        asked=job.asked,
        method={
            "allocation": recipe.allocation,
            "unit": recipe.unit,
            "levels": [str(level) for level in job.levels],
            "criterion": recipe.criterion,
            "reconstruction": recipe.resolved_reconstruction,
            "calibration_fingerprint": None if job.calibration is None else job.calibration.fingerprint,
            "seed": recipe.seed,
        },
        facts=allocation.facts,
    )
    _let_go(job)
    return stored


def _let_go(job: Job) -> None:
    """What the search has chosen from may take more room than the model that is written next."""
    shutil.rmtree(job.compute.folder / LEVELS, ignore_errors=True)


def request_of(recipe: SparsifyRecipe, *, job: Job, console: Console) -> Request:
    """What an allocator is told."""
    return Request(
        source=job.source,
        matrices=job.matrices,
        calibration=job.calibration,
        criterion=job.criterion,
        reconstruction=job.reconstruction,
        damping=recipe.damping,
        budget=job.budget,
        levels=job.levels,
        unit=recipe.unit,
        compute=job.compute,
        console=console,
    )


def allocator_of(recipe: SparsifyRecipe, *, job: Job) -> Allocator:
    """The allocator of `allocation`, with the recipe's settings."""
    if recipe.allocation == "uniform":
        return Uniform()
    rules = _rules(recipe)
    if recipe.allocation != "msp":
        return rules[str(recipe.allocation)]
    assert job.fitness is not None
    search = recipe.search
    return Msp(
        text=job.fitness,
        settings=SearchSettings(
            population=search.population,
            offspring=search.offspring,
            generations=search.generations,
            crossover=search.crossover,
            more_swaps=search.more_swaps,
        ),
        training=Training(
            steps=search.training_steps,
            learning_rate=search.training_learning_rate,
            batch=search.training_batch,
        ),
        kind=search.fitness,
        seed=recipe.seed,
        labels=recipe.labels,
        starts={name: rules[name] for name in search.starts},
    )


def _rules(recipe: SparsifyRecipe) -> dict[str, Allocator]:
    spread = recipe.spread
    rank = Rank(labels=recipe.labels, seed=recipe.seed)
    return {
        "depth": Depth() if spread is None else Depth(spread=spread),
        "alpha": Alpha() if spread is None else Alpha(epsilon=spread),
        "owl": Owl(outlier_ratio=recipe.outlier_ratio, spread=spread),
        "redundancy": Redundancy(outlier_ratio=recipe.outlier_ratio, spread=spread),
        "hessian": HessianRank(seed=recipe.seed) if spread is None else HessianRank(spread=spread, seed=recipe.seed),
        "rank": rank if spread is None else replace(rank, spread=spread),
    }


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
