"""`shear sparsify | allocate`: one-shot sparsity of one model, without a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeGuard

import typer
from rich.console import Console

from shearing.cli.frame import app
from shearing.cli.keys import with_keys
from shearing.errors import named
from shearing.pruning.sparse.recipe import SparsifyRecipe, load_sparsify_recipe, recipe_of_options

SparseModel = Annotated[
    str | None,
    typer.Argument(metavar="MODEL|RECIPE", help="A folder, a hub name, or a YAML file that says all of this."),
]
SparseOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Any other key (docs/sparsity.md): offload=disk."),
]
PANELS = {
    None: ("output", "evaluate"),
    "Method": (
        "criterion",
        "sparsity",
        "pattern",
        "group",
        "reconstruction",
        "true_sequential",
        "include",
        "exclude",
    ),
    "Allocation": ("allocation", "levels", "unit", "hardware"),
    "Calibration": ("calibration", "text_field", "samples", "seqlen", "bos", "seed"),
}
"""Keys of one-shot sparsity that have options, by heading in the help."""

ONLY_PRUNING = ("evaluate", "true_sequential")
"""Those that mean nothing where levels are chosen and nothing is pruned."""


@app.command()
@with_keys(SparsifyRecipe, PANELS, short={"output": "-o"})
def sparsify(
    model: SparseModel = None,
    overrides: SparseOverrides = None,
    *,
    check: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Only compare a sparse model with its manifest and its masks.")
    ] = None,
    **options: Any,
) -> None:
    """Zero weights in one shot: an ordinary model of the same shape, its masks, and a manifest. N:M is N kept of M."""
    if check is not None:
        _check_sparsity(check)
        return
    recipe = _sparsify_recipe(model, options=options, overrides=overrides)
    from shearing.pruning.sparse.one_shot import sparsify as run

    with named(_names(model)):
        run(recipe)


@app.command()
@with_keys(SparsifyRecipe, PANELS, without=ONLY_PRUNING, short={"output": "-o"})
def allocate(model: SparseModel = None, overrides: SparseOverrides = None, **options: Any) -> None:
    """Choose how much of each layer goes, and prune nothing: `shear sparsify --allocation FILE` does."""
    recipe = _sparsify_recipe(model, options=options, overrides=overrides)
    from shearing.pruning.sparse.levels import allocate as run

    with named(_names(model)):
        run(recipe)


def _sparsify_recipe(model: str | None, *, options: dict[str, Any], overrides: Sequence[str] | None) -> SparsifyRecipe:
    given = {name: value for name, value in options.items() if value not in (None, [])}
    if _is_recipe(model):
        last = [f"{name}={json.dumps(value)}" for name, value in given.items()]
        return load_sparsify_recipe(Path(model), overrides=[*(overrides or ()), *last])
    return recipe_of_options({"model": model, **given}, overrides=overrides or ())


def _is_recipe(model: str | None) -> TypeGuard[str]:
    return model is not None and model.endswith((".yaml", ".yml"))


def _names(model: str | None) -> dict[str, str]:
    """What people typed, by the recipe's keys."""
    typed = {} if _is_recipe(model) else {"model": "MODEL"}
    return {**typed, "domains": "data.domains"}


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
