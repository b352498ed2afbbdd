"""docs/recipes.md has what `shear plan` says of the recipes, and every recipe can be planned from its config alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from shearing.models.loading import load_config
from shearing.models.shape import Shape, resolve_target
from shearing.runs.context import RunContext
from shearing.runs.planning import preflight
from shearing.runs.recipe import load_recipe
from tests.cli.test_cli import shear
from tests.repository import RECIPES, ROOT, script

COSTS = script("costs")


def test_the_page_has_the_figures_of_today() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert COSTS.embedded(page) == page, "make docs"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-3b", 2_977_582_080),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-30b-a3b-half", 16_030_316_544),
        ("smollm2-0.7b", 688_977_408),
        ("llama-3.2-1.2b", 1_206_470_656),
        ("sheared-llama-370m", 373_867_520),
        ("sheared-pythia-160m", 162_322_944),
        ("smollm3-1.5b", 1_518_300_672),
        ("olmo-2-3b", 3_009_702_400),
        ("gemma-3-2b", 2_009_431_040),
    ],
)
def test_results_have_the_sizes_that_recipes_promise(name: str, parameters: int) -> None:
    config = load_config(str(RECIPES / "sources" / COSTS.SOURCES[name]))
    target = load_recipe(RECIPES / f"{name}.yaml").target
    assert target is not None
    count = resolve_target(target, source=config).num_parameters()
    assert count == parameters


@pytest.mark.parametrize(
    ("source", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-3b", 3_212_749_824),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("smollm2-1.7b", 1_711_376_384),
        ("smollm3-3b", 3_075_098_624),
        ("olmo-2-7b", 7_298_617_344),
        ("gemma-3-4b", 3_880_263_168),
    ],
)
def test_sources_have_the_sizes_of_the_published_models(source: str, parameters: int) -> None:
    """As their cards and safetensors headers count."""
    assert Shape.of(load_config(str(RECIPES / "sources" / source))).num_parameters() == parameters


@pytest.mark.parametrize("name", list(COSTS.SOURCES))
def test_the_command_says_the_same(name: str) -> None:
    source = f"model.source={RECIPES / 'sources' / COSTS.SOURCES[name]}"
    result = shear("plan", RECIPES / f"{name}.yaml", source, "--gpus", "8", "--gpu", "H100")
    assert result.exit_code == 0, result.output
    [made, _] = COSTS.planned(name, machine="8 x H100 of 80 GB")
    assert f"{made.target.num_parameters():,}" in result.stdout
    assert name in result.stdout


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("smollm3-1.5b", 128),
        ("olmo-2-3b", 128),
        ("gemma-3-2b", 256),
        ("sheared-pythia-160m", 64),
        ("qwen3-30b-a3b-half", 128),
    ],
)
def test_a_recipe_is_checked_as_far_as_the_config_of_its_source_says(
    name: str, head: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither weights nor tokenizer nor text are here: that is said, nothing else is wrong, and the rest is known."""
    monkeypatch.setattr(preflight, "bytes_free", lambda _: 10**15)
    keys = {"model.source": RECIPES / "sources" / COSTS.SOURCES[name], "run_dir": tmp_path / "run"}
    here = {"training.device": "cpu", "training.engine": "torch"}
    recipe = load_recipe(RECIPES / f"{name}.yaml", overrides=[f"{key}={value}" for key, value in (keys | here).items()])
    plan, errors = preflight.survey(RunContext(recipe), starts=False)
    assert [error.field for error in errors] == ["model.source (weights)", "model.source", "data.corpus"]
    assert plan is not None
    assert recipe.target is not None
    assert plan.target == resolve_target(recipe.target, source=load_config(recipe.model.source))
    assert plan.target.head_dim == head
    assert {stage.stage for stage in plan.training} == {"prune", "pretrain"}
    assert plan.tokens == {}
