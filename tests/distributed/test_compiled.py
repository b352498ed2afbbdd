"""Compiled layers, recomputed in the backward pass, under masks that are learned, on weights that come and go.

What a C++ compiler makes of them is in `tests/training/test_loop.py`: here they are traced, and run as traced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shearing.runs.recipe import Recipe
from tests.distributed import runs
from tests.distributed.conftest import Once
from tests.distributed.harness import spawn

STEPS = 8
"""Masks move until the sixth: a change of them must not be compiled in."""


def _recipe(inputs: Path, run_dir: Path, **training: Any) -> Recipe:
    return runs.recipe(inputs, run_dir=run_dir, steps=STEPS, checkpoint_interval=STEPS, **training)


def _train(recipe: Recipe) -> None:
    compiled: list[nn.Module] = []
    with_default = nn.Module.compile

    def trace(module: nn.Module) -> None:
        compiled.append(module)
        with_default(module, backend="aot_eager")

    nn.Module.compile = trace  # type: ignore[method-assign, assignment]
    runs.train(recipe, ("prune",))
    assert compiled


@pytest.mark.slow
def test_compiled_and_recomputed_layers_learn_the_same_masks(tiny_inputs: Path, tmp_path: Path, once: Once) -> None:
    plain = once(lambda run_dir: _recipe(tiny_inputs, run_dir), ("prune",))
    shared = {"engine": "fsdp2", "compile": True, "activation_checkpointing": "selective"}
    spawn(_train, _recipe(tiny_inputs, tmp_path / "run", **shared), size=2, folder=tmp_path / "out")
    found = [runs.trajectory(run_dir, "prune") for run_dir in (plain, tmp_path / "run")]
    assert runs.difference(*found) < 1e-5
