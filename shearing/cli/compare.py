"""`shear compare`: every way to choose what goes, at one shape, on the same samples, at the same learning rates."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar, get_args

import typer

from shearing.cli.frame import Overrides, RecipeFile, app, load
from shearing.errors import ShearingError
from shearing.runs.race.methods import METHODS
from shearing.runs.race.rows import Equal, RaceSettings, Refit
from shearing.settings.quantities import Duration

_Value = TypeVar("_Value")


@app.command()
def compare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(help=f"Names with commas, or all: {', '.join(METHODS)}.", show_default=True)
    ] = "all",
    seeds: Annotated[str, typer.Option(help="Of text, masks and chance: 0,1,2.")] = "0",
    tokens: Annotated[
        str | None, typer.Option(help="Budgets, as 31k,195k,1M; unset: what the stages of the recipe have.")
    ] = None,
    refit: Annotated[
        str, typer.Option(help="Forms of a method: with or without a refit of the weights that stay, or both.")
    ] = "both",
    equal: Annotated[str, typer.Option(help="Tables: tokens, flops, or tokens,flops.")] = "tokens,flops",
    flops: Annotated[
        float | None, typer.Option(help="Common budget at equal FLOPs; unset: what start takes at the tokens.")
    ] = None,
    rest_by: Annotated[str, typer.Option(help="Metric for what a method leaves out.")] = "reconstruction",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the race; unset: runs/compare-NAME.")
    ] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Only say what would run.")] = False,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the final model of every row.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run rows again that have failed.")] = False,
) -> None:
    """Race ways to choose what goes: same shape, tokens, samples and learning rates. An interrupted race continues."""
    resolved = load(recipe, overrides)
    if refit not in get_args(Refit):
        raise ShearingError("--refit", value=refit, allowed=", ".join(get_args(Refit)), mend="choose one of those")
    length = resolved.data.sequence_length
    budgets = (
        _listed("--tokens", tokens, read=_tokens, allowed="numbers of tokens, as 31k,195k,1M")
        if tokens is not None
        else (
            sum(
                stage.total_steps(sequence_length=length) * stage.tokens_per_step(sequence_length=length)
                for stage in resolved.training_stages.values()
            ),
        )
    )
    settings = RaceSettings(
        recipe=resolved,
        output=output or Path("runs") / f"compare-{resolved.name}",
        tokens=budgets,
        methods=tuple(METHODS) if methods == "all" else _listed("--methods", methods, read=str, allowed="names"),
        seeds=_listed("--seeds", seeds, read=_seed, allowed="whole numbers from 0, as 0,1,2"),
        refit=refit,  # type: ignore[arg-type]
        equal=_listed("--equal", equal, read=_table, allowed=" and ".join(get_args(Equal))),
        flops=flops,
        rest_by=rest_by,
        keep_models=keep_models,
        retry_failed=retry_failed,
    )
    from shearing.runs.race.race import compare as race

    race(settings, only_plan=only_plan)


def _listed(option: str, text: str, *, read: Callable[[str], _Value], allowed: str) -> tuple[_Value, ...]:
    try:
        return tuple(read(each.strip()) for each in text.split(",") if each.strip())
    except ValueError:
        raise ShearingError(option, value=text, allowed=allowed, mend="write them with commas in between") from None


def _tokens(text: str) -> int:
    count = Duration.parse(f"{text} tokens").tokens
    if not count:
        raise ValueError(text)
    return count


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise ValueError(text)
    return int(text)


def _table(text: str) -> Equal:
    if text not in get_args(Equal):
        raise ValueError(text)
    return text  # type: ignore[return-value]
