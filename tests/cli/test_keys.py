"""Options that are keys: which there are, what they take, and that they reach the recipe as they were typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from shearing.cli import sparse
from shearing.cli.frame import app
from shearing.cli.keys import with_keys
from shearing.pruning.sparse.recipe import SparsifyRecipe, load_sparsify_recipe, recipe_of_options
from shearing.settings.document import described
from tests.repository import RECIPES

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OWN = {"model", "overrides", "check", "help"}
RECIPE = RECIPES / "one-shot" / "wanda-2-of-4.yaml"


def _options(command: str) -> dict[str, Any]:
    return {parameter.name: parameter for parameter in COMMANDS[command].params if parameter.name not in OWN}


def _recipe_of(command: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> SparsifyRecipe:
    """The recipe that a command would carry out."""
    homes = {
        "sparsify": "shearing.pruning.sparse.one_shot.sparsify",
        "allocate": "shearing.pruning.sparse.levels.allocate",
    }
    found: list[SparsifyRecipe] = []
    monkeypatch.setattr(homes[command], found.append)
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 0, result.output
    return found[0]


@pytest.mark.parametrize("command", ["sparsify", "allocate"])
def test_every_option_is_a_key_and_says_what_the_key_says(command: str) -> None:
    for name, option in _options(command).items():
        field = SparsifyRecipe.model_fields[name]
        assert str(option.help).startswith(described(field))
        assert f"--{name.replace('_', '-')}" in option.opts
        assert option.default is None


def test_both_commands_have_the_same_options_but_those_of_pruning_alone() -> None:
    pruning, choosing = _options("sparsify"), _options("allocate")
    assert [name for name in pruning if name not in sparse.ONLY_PRUNING] == list(choosing)
    assert pruning.keys() - choosing.keys() == set(sparse.ONLY_PRUNING)
    for name, option in choosing.items():
        assert (option.opts, option.help) == (pruning[name].opts, pruning[name].help)


@pytest.mark.parametrize("command", ["sparsify", "allocate"])
def test_options_make_the_same_recipe_as_keys(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = "m -o o.json --criterion wanda --target 0.5 --levels 1:8,2:8 --allocation msp --unit matrix --hardware 2:4 "
    typed += "--calibration a --calibration b --samples 3 --seqlen 5 --seed 7 --include x* --include y* --exclude z*"
    keys: dict[str, Any] = {
        "model": "m",
        "output": "o.json",
        "criterion": "wanda",
        "sparsity": 0.5,
        "levels": ["1:8", "2:8"],
        "allocation": "msp",
        "unit": "matrix",
        "hardware": "2:4",
        "calibration": ["a", "b"],
        "samples": 3,
        "seqlen": 5,
        "seed": 7,
        "include": ["x*", "y*"],
        "exclude": ["z*"],
    }
    assert _recipe_of(command, *typed.split(), monkeypatch=monkeypatch) == recipe_of_options(keys)


def test_options_go_over_a_file_and_over_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [str(RECIPE), "samples=3", "seed=2", "--samples", "5", "--true-sequential", "--exclude", "a*"]
    found = _recipe_of("sparsify", *arguments, monkeypatch=monkeypatch)
    expected = load_sparsify_recipe(RECIPE, overrides=["seed=2", "samples=5", "true_sequential=true", "exclude=['a*']"])
    assert found == expected


@pytest.mark.parametrize("command", ["sparsify", "allocate"])
def test_errors_name_the_option_as_it_was_typed(command: str) -> None:
    for typed, said in (
        (["--criterion", "wand"], "override --criterion wand: criterion = 'wand'"),
        (["--samples", "0"], "override --samples 0: samples = 0"),
        (["--sparsity", "2"], "override --sparsity 2.0: sparsity = 2.0"),
        (["--samples", "many"], "'--samples'"),
    ):
        result: Result = CliRunner().invoke(app, [command, "m", "-o", "o", *typed], env={"COLUMNS": "200"})
        assert result.exit_code == 2
        assert said in result.stderr


def test_a_key_that_is_left_out_is_no_option() -> None:
    @with_keys(SparsifyRecipe, {None: ("samples", "seed")}, without=("seed",))
    def command(path: Path, *, flag: bool = False, **options: Any) -> None:
        del path, flag, options

    parameters = typer.main.get_params_from_function(command)
    assert list(parameters) == ["path", "samples", "flag"]


def test_help_says_what_has_to_be_given() -> None:
    required = [name for name, option in _options("moe").items() if "Required." in str(option.help)]
    assert required == ["output", "calibration"]
    assert not [name for name, option in _options("sparsify").items() if "Required." in str(option.help)]
