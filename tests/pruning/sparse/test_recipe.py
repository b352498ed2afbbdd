"""The file and the options of the command: what is shipped loads, and ratios are ratios in YAML too."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from shearing.errors import ShearingError
from shearing.pruning.sparse.recipe import load_sparsify_recipe, recipe_of_options
from tests.repository import RECIPES

RECIPES = sorted((RECIPES / "one-shot").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load(path: Path) -> None:
    recipe = load_sparsify_recipe(path)
    assert recipe.output.name == path.stem


@pytest.mark.parametrize("ratio", ["2:4", "4:8", "1:4", "7:16", "1:32"])
def test_a_ratio_needs_no_quotes(ratio: str, tmp_path: Path) -> None:
    path = tmp_path / "sparse.yaml"
    path.write_text(f"model: m\noutput: o\ncriterion: magnitude\npattern: {ratio}\n")
    assert load_sparsify_recipe(path).pattern == ratio
    other = load_sparsify_recipe(path, overrides=["pattern=3:4"])
    assert (other.pattern, other.budget) == ("3:4", Fraction(3, 4))


def test_what_is_unset_is_as_published() -> None:
    common = {"model": "m", "output": "o", "sparsity": 0.29, "calibration": ["text"]}
    resolved = {}
    for criterion in ("magnitude", "wanda", "sparsegpt"):
        recipe = recipe_of_options({**common, "criterion": criterion})
        resolved[criterion] = (recipe.resolved_group, recipe.resolved_reconstruction, recipe.needs_text)
        assert recipe.budget == Fraction(71, 100)
    assert resolved == {
        "magnitude": ("layer", "none", False),
        "wanda": ("row", "none", True),
        "sparsegpt": ("layer", "obs", True),
    }


def test_all_errors_at_once() -> None:
    with pytest.raises(ShearingError) as caught:
        recipe_of_options({"model": "m", "output": "o", "criterion": "wanda", "pattern": "6:4"})
    message = str(caught.value)
    assert "calibration" in message
    assert "override --pattern 6:4" in message
    with pytest.raises(ShearingError, match="did you mean seqlen"):
        recipe_of_options({"model": "m", "output": "o", "criterion": "magnitude"}, overrides=["seqlength=4"])
