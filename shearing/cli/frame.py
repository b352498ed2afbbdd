"""What all commands share: the application, how it says errors, and the arguments that many have."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from shearing.errors import ShearingError
from shearing.runs.recipe import Recipe, load_recipe


class _Commands(TyperGroup):
    """Turns an error that the user can mend into one message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ShearingError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except OSError as error:
            from shearing.files.refusals import said_of_file

            if ctx.params.get("debug") or (said := said_of_file(error)) is None:
                raise
            typer.echo(f"error: {said}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted: the same command continues the run", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="shear",
    cls=_Commands,
    help="Make a language model smaller: find which parts to cut, cut them exactly, train on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config = typer.Typer(help="Look at a recipe without running it.", no_args_is_help=True)
app.add_typer(config, name="config")
data = typer.Typer(help="From raw text to the domains of a run.", no_args_is_help=True)
app.add_typer(data, name="data")
reference_loss = typer.Typer(help="Losses to aim at: measure models, fit a law to them, predict.", no_args_is_help=True)
data.add_typer(reference_loss, name="reference-loss")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Dotted keys over the file: prune.learning_rate=1e-4."),
]


def _print_versions(asked: bool) -> None:
    """Say which versions are installed, without importing anything, and end."""
    if not asked:
        return
    for package in ("shearing", "torch", "transformers"):
        typer.echo(f"{package} {_version(package)}")
    raise typer.Exit


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_versions, help="Show versions, torch's among them."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar="SHEARING_DEBUG", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command."""


def load(path: Path, overrides: Sequence[str] | None) -> Recipe:
    """The recipe that `RecipeFile` and `Overrides` name."""
    return load_recipe(path, overrides=overrides or ())
