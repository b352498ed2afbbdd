"""`shear sparsify | allocate | export`: one-shot sparsity of one model, without a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from shearing.cli.frame import app
from shearing.errors import ShearingError

if TYPE_CHECKING:
    from shearing.pruning.sparse.recipe import SparsifyRecipe


def _sparsity(text: str, *names: str, panel: str = "Method") -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


SparseModel = Annotated[
    str | None,
    typer.Argument(metavar="MODEL|RECIPE", help="A folder, a hub name, or a YAML file that says all of this."),
]
SparseOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Any other key (docs/sparsity.md): offload=disk."),
]
Criterion = Annotated[str | None, _sparsity("magnitude, wanda or sparsegpt.")]
Sparsity = Annotated[float | None, _sparsity("Share of weights to remove: 0.5.", "--sparsity", "--target")]
PatternOption = Annotated[str | None, _sparsity("N:M, N kept of each M consecutive inputs: 2:4 keeps 2 of 4.")]
Group = Annotated[
    str | None, _sparsity("Unstructured: row, layer or cumulative; row for wanda and layer for others if unset.")
]
Reconstruction = Annotated[str | None, _sparsity("none or obs; obs for sparsegpt and none for others if unset.")]
Include = Annotated[list[str] | None, _sparsity("Modules to prune, as '*.down_proj'; may be repeated.")]
Exclude = Annotated[list[str] | None, _sparsity("Modules to leave dense; may be repeated.")]
Levels = Annotated[str | None, _sparsity("Patterns to choose from, N kept of M: 1:8,2:8,4:8.", panel="Allocation")]
Unit = Annotated[str | None, _sparsity("What has a level of its own: block or matrix.", panel="Allocation")]
Hardware = Annotated[str | None, _sparsity("2:4: only levels that sparse tensor cores run.", panel="Allocation")]
CalibrationText = Annotated[
    list[str] | None,
    _sparsity("A prepared corpus, or plain text files (repeat the option).", panel="Calibration"),
]
Samples = Annotated[int | None, _sparsity("Sequences: 128.", panel="Calibration")]
Seqlen = Annotated[int | None, _sparsity("Tokens of each: 2048.", panel="Calibration")]
Seed = Annotated[int | None, _sparsity("Of the draw, and of a search: 0.", panel="Calibration")]


@app.command()
def sparsify(
    model: SparseModel = None,
    overrides: SparseOverrides = None,
    criterion: Criterion = None,
    sparsity: Sparsity = None,
    pattern: PatternOption = None,
    group: Group = None,
    reconstruction: Reconstruction = None,
    true_sequential: Annotated[
        bool | None, _sparsity("Inside a layer too, see what is pruned already.", "--true-sequential")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    allocation: Annotated[
        str | None,
        _sparsity("uniform, depth, alpha, owl, rank, msp, or an allocation.json.", panel="Allocation"),
    ] = None,
    levels: Levels = None,
    unit: Unit = None,
    hardware: Hardware = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder of the sparse model.")] = None,
    evaluate: Annotated[str | None, typer.Option(help="Corpus to compare dense and sparse on, held-out text.")] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Only compare a sparse model with its manifest and its masks.")
    ] = None,
) -> None:
    """Zero weights in one shot: an ordinary model of the same shape, its masks, and a manifest. N:M is N kept of M."""
    if check is not None:
        _check_sparsity(check)
        return
    options = {
        "criterion": criterion,
        "sparsity": sparsity,
        "pattern": pattern,
        "group": group,
        "reconstruction": reconstruction,
        "true_sequential": true_sequential,
        "include": include or None,
        "exclude": exclude or None,
        "allocation": allocation,
        "levels": levels,
        "unit": unit,
        "hardware": hardware,
        "calibration": calibration or None,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "output": output,
        "evaluate": evaluate,
    }
    recipe = _sparsify_recipe(model, options=options, overrides=overrides)
    from shearing.pruning.sparse.one_shot import sparsify as run

    run(recipe)


@app.command()
def allocate(
    model: SparseModel = None,
    overrides: SparseOverrides = None,
    criterion: Criterion = None,
    sparsity: Sparsity = None,
    pattern: PatternOption = None,
    group: Group = None,
    reconstruction: Reconstruction = None,
    include: Include = None,
    exclude: Exclude = None,
    allocation: Annotated[str | None, _sparsity("depth, alpha, owl, rank or msp.", panel="Allocation")] = None,
    levels: Levels = None,
    unit: Unit = None,
    hardware: Hardware = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="The file, as allocation.json.")] = None,
) -> None:
    """Choose how much of each layer goes, and prune nothing: `shear sparsify --allocation FILE` does."""
    options = {
        "criterion": criterion,
        "sparsity": sparsity,
        "pattern": pattern,
        "group": group,
        "reconstruction": reconstruction,
        "include": include or None,
        "exclude": exclude or None,
        "allocation": allocation,
        "levels": levels,
        "unit": unit,
        "hardware": hardware,
        "calibration": calibration or None,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "output": output,
    }
    recipe = _sparsify_recipe(model, options=options, overrides=overrides)
    from shearing.pruning.sparse.levels import allocate as run

    run(recipe)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A sparse model: a folder, or a hub name.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the exported model.")],
    semi_structured: Annotated[
        bool, typer.Option("--semi-structured", help="For GPUs that multiply 2:4 matrices faster.")
    ] = False,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Tokens at a time at which a layer has to be faster; may be repeated: 1, 64, 2048 if unset."),
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp16; auto: as stored, bf16 for fp32.")] = "auto",
    backend: Annotated[
        str, typer.Option(help="auto, cusparselt or cutlass; auto: the better for each layer.")
    ] = "auto",
    margin: Annotated[float, typer.Option(help="Share that a layer has to be faster by.")] = 0.05,
    revision: Annotated[str | None, typer.Option(help="Hub revision; only for hub names.")] = None,
) -> None:
    """Time a model's 2:4 layers on the GPU here and write which of them to convert. 2:4 is 2 kept of 4."""
    if not semi_structured:
        raise ShearingError(
            "--semi-structured",
            value=False,
            allowed="the one kind of export there is; every other model that is written here is ready for use",
            mend="add --semi-structured",
        )
    from shearing.pruning.sparse.semi_structured.export import BATCHES, export as run

    run(
        model,
        output=output,
        batches=batch or BATCHES,
        precision=precision,
        backend=backend,
        margin=margin,
        revision=revision,
    )


def _sparsify_recipe(model: str | None, *, options: dict[str, Any], overrides: Sequence[str] | None) -> SparsifyRecipe:
    from shearing.pruning.sparse.recipe import load_sparsify_recipe, recipe_of_options

    if model is not None and model.endswith((".yaml", ".yml")):
        given = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
        return load_sparsify_recipe(Path(model), overrides=[*(overrides or ()), *given])
    return recipe_of_options({"model": model, **options}, overrides=overrides or ())


def _check_sparsity(folder: Path) -> None:
    from shearing.progress import activity
    from shearing.pruning.sparse.stored.check import bytes_to_check, differences

    console = Console()
    with activity(f"checking {folder}", total=bytes_to_check(folder), console=console) as advance:
        found = differences(folder, advance=advance)
    for difference in found:
        typer.echo(difference)
    if found:
        raise typer.Exit(1)
    console.print(f"{folder} is what its manifest says", soft_wrap=True, highlight=False)
