"""`shear moe`: a dense model as a mixture of experts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shearing.cli.frame import app
from shearing.cli.keys import with_keys
from shearing.errors import named
from shearing.pruning.experts.recipe import MoeRecipe, moe_recipe_of

PANELS = {
    None: ("output", "revision"),
    "Experts": ("experts", "active", "split"),
    "Calibration": ("calibration", "text_field", "samples", "seqlen", "bos", "seed"),
}


@app.command()
@with_keys(MoeRecipe, PANELS, short={"output": "-o"}, alone=True)
def moe(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or hub name of a dense model.")],
    **options: Any,
) -> None:
    """Share the units of every MLP out among experts: an ordinary mixture (Mixtral, Qwen3-MoE), to be trained on."""
    given = {name: value for name, value in options.items() if value not in (None, [])}
    with named(
        {name: f"--{name.replace('_', '-')}" for name in MoeRecipe.model_fields if name != "model"} | {"model": "MODEL"}
    ):
        recipe = moe_recipe_of({"model": model, **given})
        from shearing.pruning.experts.make import make_experts

        written = make_experts(recipe)
    typer.echo(f"to train it on: model.source={written} in a recipe with neither target nor prune (docs/moe.md)")
