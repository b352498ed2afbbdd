"""What a method cannot do for a model, a target or a recipe is said before anything runs; what it can do runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shearing.errors import ShearingError
from shearing.files.durable import read_json
from shearing.models.shape import Shape
from shearing.runs.race.checks import unfit
from shearing.runs.race.methods import Contender, contender_of
from shearing.runs.race.race import compare
from shearing.runs.race.rows import RaceSettings
from shearing.runs.recipe import Recipe
from tests.conftest import tiny_recipe_data
from tests.models.experts import expert_configs
from tests.models.tiny import tiny_model

SUBLAYERS = ("leave_one_out_sublayers", "shapley_sublayers")


def recipe_of(inputs: Path, **sections: Any) -> Recipe:
    """A recipe of a race over the tiny model."""
    data = {**tiny_recipe_data(inputs, run_dir=Path("unused")), **sections}
    return Recipe.model_validate({**data, "mixture": {"update": "constant"}})


def race(recipe: Recipe, output: Path, *methods: str) -> dict[str, Any]:
    """Its rows by name, of two steps each."""
    settings = RaceSettings(
        recipe=recipe, output=output, tokens=(64,), methods=methods, equal=("tokens",), refit="without"
    )
    compare(settings, console=Console(quiet=True))
    return {path.stem: read_json(path) for path in (output / "rows").glob("*.json")}


def said_of(contender: Contender, recipe: Recipe, *, source: Shape, **target: int) -> list[str]:
    """What is said against a method for a target of these sizes."""
    found = unfit(contender, recipe=recipe, source=source, target=dataclasses.replace(source, **target))
    return [str(error) for error in found]


def test_rankings_keep_the_masks_by_which_streams_are_matched(tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_inputs, distill={"weight": 0.5, "hidden": {}})
    rows = race(recipe, tmp_path, "random", "leave_one_out_sublayers", "start")
    assert len(rows) == 3
    assert all(row["losses"]["final"]["mean"] > 0 for row in rows.values())


def test_no_streams_are_matched_from_scratch(tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_inputs, distill={"weight": 0.5, "hidden": {}})
    with pytest.raises(ShearingError, match=r"(?s)--methods = 'scratch'.*distill\.hidden=null"):
        race(recipe, tmp_path, "random", "scratch")
    assert not (tmp_path / "rows").exists()
    assert not said_of(
        contender_of("scratch", refitted=False, rest_by="reconstruction"),
        recipe_of(tiny_inputs, distill={"weight": 0.5}),
        source=Shape.of(tiny_model().config),
        num_hidden_layers=2,
    )


@pytest.mark.parametrize("method", SUBLAYERS)
@pytest.mark.parametrize(("family", "parallel"), [("gpt_neox", True), ("gpt_neox-in-turn", False), ("llama", False)])
def test_metrics_of_sublayers_are_for_layers_whose_parts_go_apart(
    tiny_inputs: Path, method: str, family: str, parallel: bool
) -> None:
    source = Shape.of(tiny_model(family).config)
    contender = contender_of(method, refitted=False, rest_by="reconstruction")
    found = said_of(contender, recipe_of(tiny_inputs), source=source, num_hidden_layers=2)
    assert len(found) == parallel
    assert all(method in said and "read the same residual stream" in said for said in found)
    whole = contender_of("leave_one_out", refitted=False, rest_by="reconstruction")
    assert not said_of(whole, recipe_of(tiny_inputs), source=source, num_hidden_layers=2)


@pytest.mark.parametrize("method", ["hard_budget", "hard_budget_graded", "policy_gradient"])
def test_metrics_that_are_not_for_experts_are_refused(tiny_inputs: Path, method: str) -> None:
    with expert_configs():
        source = Shape.of(tiny_model("qwen3_moe").config)
    contender = contender_of(method, refitted=False, rest_by="reconstruction")
    (said,) = said_of(contender, recipe_of(tiny_inputs), source=source, num_experts=3)
    assert "not made of experts" in said
