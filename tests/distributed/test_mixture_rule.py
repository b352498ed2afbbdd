"""A rule that remembers, with a reference fitted on the way, on several processes: one sequence of weights for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from shearing.data.mixture.online import MINIMUM_OBSERVATIONS
from shearing.runs.recipe import Recipe
from shearing.training.checkpoints.state import read_state
from tests.distributed import runs
from tests.distributed.harness import spawn

STEPS = 12


def _recipe(inputs: Path, run_dir: Path) -> Recipe:
    plain = runs.recipe(inputs, run_dir=run_dir, steps=STEPS)
    values = plain.model_dump(mode="json")
    values["mixture"] |= {"update": "robust", "reference": "online", "interval": "1 steps"}
    return Recipe.model_validate(values)


@pytest.mark.slow
def test_two_processes_update_weights_as_one_does(tiny_inputs: Path, tmp_path: Path) -> None:
    states = []
    for size in (1, 2):
        run_dir = tmp_path / f"run-{size}"
        spawn(runs.train, _recipe(tiny_inputs, run_dir), ("prune",), size=size, folder=tmp_path / f"out-{size}")
        updates = [line for line in runs.lines(run_dir, "prune") if "event" in line]
        assert len({str(update["reference"]) for update in updates}) > 1
        assert len(updates) > MINIMUM_OBSERVATIONS
        states.append(read_state(run_dir / "prune" / "checkpoints" / f"step-{STEPS:08d}", "state")["mixture_rule"])
    # Until there is a prediction there is nothing that rounding could tip over.
    early = [[each["losses"] for each in state["observations"][:MINIMUM_OBSERVATIONS]] for state in states]
    assert runs.difference(*early) < 1e-5
    sizes = [[each["parameters"] for each in state["observations"]] for state in states]
    assert runs.difference(*sizes) < 1e-5
    assert runs.difference(*[state["memory"] for state in states]) < 1e-2
