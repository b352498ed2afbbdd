"""A teacher cache written by several processes, killed and continued by others; and several that learn from it."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from shearing.runs.recipe import Recipe
from shearing.runs.teacher_cache import Asked, write
from tests.distributed import runs
from tests.distributed.harness import SECONDS, spawn, start
from tests.runs.test_teacher_cache import asked, content

pytestmark = pytest.mark.slow


def write_here(request: Asked) -> None:
    """What every process runs."""
    write(request)


def test_two_processes_write_what_one_does_also_when_killed(tiny_inputs: Path, tmp_path: Path) -> None:
    requests = {name: asked(tiny_inputs, tmp_path / name) for name in ("one", "two", "killed")}
    spawn(write_here, requests["one"], size=1, folder=tmp_path / "out-1")
    spawn(write_here, requests["two"], size=2, folder=tmp_path / "out-2")
    expected = content(tmp_path / "one")
    assert content(tmp_path / "two") == expected
    group = start(write_here, requests["killed"], size=2, folder=tmp_path / "out-killed")
    deadline = time.monotonic() + SECONDS
    while not any((tmp_path / "killed").rglob("piece*")) and time.monotonic() < deadline:
        group.processes[0].join(0.001)
    group.processes[1].kill()
    codes = group.wait()
    assert codes in ([1, -signal.SIGKILL], [0, 0])
    spawn(write_here, requests["killed"], size=1, folder=tmp_path / "out-again")
    assert content(tmp_path / "killed") == expected


def _recipe(inputs: Path, run_dir: Path, *, cache: Path, **training: Any) -> Recipe:
    values = runs.recipe(inputs, run_dir=run_dir, steps=8, **training).model_dump(mode="json")
    values["distill"] = {"weight": 0.6, "domains": "auto", "margin": 0.05, "cache": str(cache)}
    values["distill"] |= {"cache_missing": "compute", "skip_low_entropy": 0.2}
    values["mixture"] |= {"reference": "teacher", "losses": "training", "interval": "2 steps"}
    return Recipe.model_validate(values)


@pytest.mark.parametrize(
    "training",
    [{}, {"engine": "deepspeed", "zero_stage": 2}, {"engine": "deepspeed", "zero_stage": 3}],
    ids=["torch", "ZeRO-2", "ZeRO-3"],
)
def test_several_processes_learn_what_one_does(training: dict[str, Any], tiny_inputs: Path, tmp_path: Path) -> None:
    if training:
        pytest.importorskip("deepspeed")
    write(asked(tiny_inputs, tmp_path / "cache", rows=30))  # some rows are asked for
    found = []
    for processes, settings in ((1, {}), (2, training)):
        run_dir = tmp_path / f"run-{processes}"
        recipe = _recipe(tiny_inputs, run_dir, cache=tmp_path / "cache", **settings)
        spawn(runs.train, recipe, ("prune",), size=processes, folder=tmp_path / f"out-{processes}")
        names = ("loss", "domain_losses", "domain_teacher_losses", "domain_divergences", "domain_teacher_weights")
        lines = runs.lines(run_dir, "prune")
        found.append([{name: line[name] for name in (*names, "weights") if name in line} for line in lines])
    assert runs.difference(*found) < 1e-3
