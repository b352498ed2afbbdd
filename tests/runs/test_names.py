"""Whatever a component calls a setting, people read the key that they can change."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from shearing.data.mixture.weights import resolve_weights
from shearing.errors import ShearingError, named
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import granularities_of
from shearing.pruning.structured.parameter_budget import ParameterBudget, round_to_budget, uniform_shape
from shearing.runs.names import COMPONENT_NAMES, DISTILL_NAMES, ONE_SHOT_NAMES, SECTIONS, own_keys
from shearing.runs.recipe import Recipe
from shearing.settings.document import section_of
from shearing.training.engines.deepspeed_engine import import_deepspeed
from shearing.training.recipe import StageRecipe
from tests.models.tiny import CONFIGS

SOURCE = Shape.of(CONFIGS["llama"]())
WIDTHS = granularities_of(["hidden"], source=SOURCE, target=None)
HIDDEN = torch.ones(SOURCE.hidden_size)


def test_all_sections_have_names() -> None:
    sections = {name for name, field in Recipe.model_fields.items() if section_of(field)}
    # What only runs read, and what has names of its own.
    assert sections - {"evaluation", "sparsify", "distill", "search", "cascade", "family"} == {
        section.partition(".")[0] for section in SECTIONS
    }


def test_a_name_stands_for_one_key() -> None:
    counts = Counter(name for section in SECTIONS.values() for name in own_keys(section))
    counts.update([*StageRecipe.model_fields, "folder"])
    assert {name for name, count in counts.items() if count > 1} == set()
    assert counts.keys() == COMPONENT_NAMES.keys()


@pytest.mark.parametrize("key", sorted({*COMPONENT_NAMES.values(), *DISTILL_NAMES.values(), *ONE_SHOT_NAMES.values()}))
def test_every_name_stands_for_a_key_of_the_recipe(key: str) -> None:
    for each in key.split(" and "):
        section = Recipe
        *above, last = each.split(".")
        for part in above:
            section = section_of(section.model_fields[part])  # type: ignore[assignment]
        assert last in section.model_fields


def test_a_second_renaming_changes_nothing() -> None:
    assert not COMPONENT_NAMES.keys() & {*COMPONENT_NAMES.values(), *ONE_SHOT_NAMES.values()}


def _narrower() -> object:
    target = dataclasses.replace(SOURCE, hidden_size=SOURCE.hidden_size // 2)
    return granularities_of(["layers"], source=SOURCE, target=target)


def _too_small() -> object:
    return round_to_budget({"hidden": HIDDEN}, granularities=WIDTHS, source=SOURCE, parameters=10)


def _no_shape() -> object:
    budget = ParameterBudget(10, uniform=True, accepts=lambda _: True)
    return uniform_shape({"hidden": HIDDEN}, source=SOURCE, budget=budget)


@pytest.mark.parametrize(
    ("component", "field", "text"),
    [
        (_narrower, "prune.granularities", "to mend: add 'hidden' to prune.granularities, or leave"),
        (
            _too_small,
            "target.parameters",
            "to mend: raise target.parameters, or add granularities to prune.granularities",
        ),
        (_no_shape, "target.parameters", "raise target.parameters or prune more kinds of units (prune.granularities)"),
        (
            lambda: resolve_weights({"books": -1.0}, tokens={"books": 1}),
            "mixture.initial_weights.books",
            "to mend: correct it",
        ),
        (
            lambda: import_deepspeed(torch.device("cpu")),
            "training.engine",
            "to mend: pip install 'shearing[deepspeed]', or set training.engine=torch",
        ),
    ],
    ids=["granularities", "budget", "uniform budget", "weight of a domain", "deepspeed"],
)
def test_errors_that_the_checks_before_a_run_leave_nothing_of(
    component: Callable[[], object], field: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ShearingError) as caught, named(COMPONENT_NAMES):
        component()
    assert caught.value.field == field
    assert text in str(caught.value)
