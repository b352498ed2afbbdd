"""Documents, answers and domain averages: one trajectory whatever the processes, engines and splits of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shearing.runs.recipe import Recipe
from tests.data.corpus.answers import with_answers
from tests.distributed import runs
from tests.distributed.harness import spawn

TOLERANCE = 1e-5
CLASSES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 process, micro-batches of 1": (1, {}),
    "2 processes": (2, {}),
    "ZeRO-3, 2 processes, checkpointing": (
        2,
        {"engine": "deepspeed", "zero_stage": 3, "activation_checkpointing": "selective"},
    ),
}


def _recipe(inputs: Path, run_dir: Path, **settings: Any) -> Recipe:
    chosen = runs.recipe(inputs, run_dir=run_dir, steps=10, **settings)
    data = {"attention": "documents", "loss_across_documents": False}
    return chosen.model_copy(
        update={
            "data": chosen.data.model_copy(update=data),
            "mixture": chosen.mixture.model_copy(update={"losses": "training"}),
        }
    )


def _trajectory(run_dir: Path) -> list[dict[str, Any]]:
    every_line = zip(runs.trajectory(run_dir, "prune"), runs.lines(run_dir, "prune"), strict=True)
    return [{**kept, "domain_losses": line.get("domain_losses", {})} for kept, line in every_line]


@pytest.fixture(scope="module")
def inputs(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, and of one domain some tokens that do not count."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "model").symlink_to(tiny_inputs / "model")
    with_answers(tiny_inputs / "corpus", folder / "corpus", domain="letters")
    return folder


@pytest.fixture(scope="module")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one")
    recipe = _recipe(inputs, folder / "run", micro_batch_size=2)
    spawn(runs.train, recipe, ("prune",), size=1, folder=folder / "out")
    return _trajectory(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_one_trajectory(name: str, expected: list[dict[str, Any]], inputs: Path, tmp_path: Path) -> None:
    size, settings = CLASSES[name]
    if settings.get("engine") == "deepspeed":
        pytest.importorskip("deepspeed")
    recipe = _recipe(inputs, tmp_path / "run", **settings)
    spawn(runs.train, recipe, ("prune",), size=size, folder=tmp_path / "out")
    found = _trajectory(tmp_path / "run")
    assert [line["losses"].keys() for line in found if {"losses", "weights"} <= line.keys()] == [
        {"digits", "letters"}
    ] * 2
    assert runs.difference(expected, found) < TOLERANCE
