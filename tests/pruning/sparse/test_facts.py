"""What recipes know of criteria, reconstructions and allocations is what these are."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shearing.errors import ShearingError
from shearing.pruning.sparse.allocation.facts import ALLOCATIONS, RULES
from shearing.pruning.sparse.criteria import CRITERIA, criteria
from shearing.pruning.sparse.recipe import OneShotRecipe, recipe_of_options
from shearing.pruning.sparse.reconstruction import RECONSTRUCTIONS, reconstructions
from shearing.settings.document import describe_type

FACES = ("criteria", "reconstruction", "allocation")


def test_every_criterion_is_what_its_facts_say() -> None:
    found = {name: (criterion.name, criterion.needs) for name, criterion in criteria().items()}
    assert found == {name: (name, facts.needs) for name, facts in CRITERIA.items()}
    assert {facts.reconstruction for facts in CRITERIA.values()} <= RECONSTRUCTIONS.keys()


def test_every_reconstruction_is_what_its_facts_say() -> None:
    found = {name: (way.name, way.needs) for name, way in reconstructions().items()}
    assert found == {name: (name, facts.needs) for name, facts in RECONSTRUCTIONS.items()}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation_can_be_asked_for(allocation: str) -> None:
    """Whoever reads no text is content without any, and only that."""
    options = {"model": "m", "output": "o", "criterion": "magnitude", "sparsity": 0.5, "allocation": allocation}
    if ALLOCATIONS[allocation].reads_text:
        with pytest.raises(ShearingError, match=f"allocation {allocation} reads text"):
            recipe_of_options(options)
        options["calibration"] = ["text"]
    assert recipe_of_options(options).needs_text == ALLOCATIONS[allocation].reads_text


@pytest.mark.parametrize(
    ("key", "names"),
    [("criterion", CRITERIA), ("reconstruction", RECONSTRUCTIONS), ("allocation", ALLOCATIONS)],
)
def test_recipes_take_what_there_is(key: str, names: dict[str, object]) -> None:
    takes = describe_type(OneShotRecipe.model_fields[key].annotation)
    assert all(f"`{name}`" in takes for name in names)
    assert takes.count("`") == 2 * len(names)


def test_a_search_begins_with_every_rule_that_is_cheap() -> None:
    options = {"model": "m", "output": "o", "criterion": "magnitude", "sparsity": 0.5}
    assert recipe_of_options(options).search.starts == [name for name in RULES if name != "hessian"]


def test_reading_facts_does_not_import_torch() -> None:
    code = "import sys, shearing.pruning.sparse.recipe as recipe\n" + "".join(
        f"import shearing.pruning.sparse.{face}.facts\n" for face in FACES
    )
    code += "from shearing.pruning.sparse.criteria import CRITERIA\nassert 'torch' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], check=True)
