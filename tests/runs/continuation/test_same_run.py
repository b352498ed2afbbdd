"""A folder's run is continued by its own recipe: every key has to be what it was, unless it is neutral or unused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from shearing.errors import ShearingError
from shearing.runs.continuation.same_run import require_same_run
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory, Stage
from shearing.settings.document import keys
from shearing.settings.neutral import is_neutral, neutral_keys
from tests.conftest import tiny_recipe_data

KEYS = [name for name, _ in keys(Recipe)]
APART = {
    "spp": {"spp": {}},
    "speft": {"speft": {}},
    "ast": {"ast": {}},
    "ist": {"ist": {}, "lora": {}},
    "": {"lora": {}},
}
"""Sections of pretrain that do not go with all others."""


def recipe_with(key: str, *, folder: Path) -> Recipe:
    """With all sections that go with that of a key."""
    data = tiny_recipe_data(folder, run_dir=folder / "run")
    if key.startswith("cascade."):
        return Recipe.model_validate(data | {"cascade": {"targets": {"half": {"num_hidden_layers": 3}}}})
    if key.startswith("family."):
        return Recipe.model_validate(data | {"family": {"sizes": {"half": {"num_hidden_layers": 1}}}})
    data["sparsify"] = {"criterion": "wanda", "pattern": "2:4"}
    data["pretrain"] |= APART[next(name for name in APART if not name or key.startswith(f"pretrain.{name}."))]
    data["prune"]["block_refit"] = {"steps": 1}
    data["distill"] = {"hidden": {}}
    data["search"] = {"parameters": "1M"}
    return Recipe.model_validate(data)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """With all sections."""
    return recipe_with("", folder=tmp_path)


def _refusal(recipe: Recipe, *, changed: str, begun: tuple[Stage, ...]) -> str | None:
    """Why the recipe may not go on with a run that had another value of one key; None where it may."""
    earlier = copy.deepcopy(recipe.model_dump(mode="json"))
    *above, last = changed.split(".")
    section: dict[str, Any] = earlier
    for name in above:
        section = section[name]
    section[last] = "another"
    directory = RunDirectory(recipe.run_dir)
    directory.path.mkdir(exist_ok=True)
    directory.recipe.write_text(yaml.safe_dump(earlier))
    for stage in begun:
        directory.folder(stage).mkdir(exist_ok=True)
    try:
        require_same_run(recipe, directory=directory)
    except ShearingError as error:
        return str(error)
    return None


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_either_neutral_or_compared(tmp_path: Path, key: str) -> None:
    refusal = _refusal(
        recipe_with(key, folder=tmp_path), changed=key, begun=("prune", "compact", "sparsify", "pretrain")
    )
    if is_neutral(key, among=neutral_keys(Recipe)):
        assert refusal is None
    else:
        assert refusal is not None
        assert f"recipe.yaml: {key} was 'another' and is" in refusal


@pytest.mark.parametrize(
    ("begun", "key", "refused"),
    [
        ((), "seed", False),
        (("prune",), "seed", True),
        (("prune",), "pretrain.learning_rate", False),
        (("prune",), "mixture.pretrain_interval", False),
        (("prune",), "mixture.interval", True),
        (("prune",), "sparsify.pattern", False),
        (("prune", "sparsify"), "sparsify.pattern", True),
        (("prune", "pretrain"), "pretrain.learning_rate", True),
    ],
)
def test_a_key_may_change_until_a_stage_has_used_it(
    recipe: Recipe, begun: tuple[Stage, ...], key: str, refused: bool
) -> None:
    assert (_refusal(recipe, changed=key, begun=begun) is not None) == refused


def test_keys_below_a_neutral_section_that_no_longer_exist_are_neutral(recipe: Recipe) -> None:
    assert _refusal(recipe, changed="evaluation.of_an_earlier_release", begun=("prune",)) is None
    assert _refusal(recipe, changed="prune.of_an_earlier_release", begun=("prune",)) is not None


def test_with_one_schedule_mask_learning_uses_the_length_of_pretraining(tmp_path: Path) -> None:
    data = tiny_recipe_data(tmp_path, run_dir=tmp_path / "run") | {"one_schedule": True}
    one = Recipe.model_validate(data)
    assert _refusal(one, changed="pretrain.duration", begun=("prune",)) is not None
    assert _refusal(one, changed="pretrain.optimizer", begun=("prune",)) is None
