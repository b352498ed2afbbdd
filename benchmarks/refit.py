"""What becomes of a model right after a cut and a little later: by how weights are refitted, by the stream's basis.

    python benchmarks/refit.py [rotation] [--quick] [--arms NAME …] [--recipe recipes/race-135m.yaml]
                               [--output runs/refit] [key=value …]

`rotation`: the cut in the source's basis and in that of principal components, at two widths. A tied source is rotated
with a head of its own; beside it is one that has that and is not rotated, for it has as many parameters.

Every arm is an ordinary run that cuts at once and trains for 30 steps. Losses are of test text and of text of no
training domain. Arms are kept in the output folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from structured import quick_inputs
from transformers import AutoModelForCausalLM

from shearing.evaluation.environment import environment
from shearing.files.durable import read_json, write_json
from shearing.models.shape import Shape
from shearing.models.stored.companions import copy_companions
from shearing.models.stored.saving import write_model
from shearing.pruning.rotation.basis import untie
from shearing.runs.context import RunContext
from shearing.runs.race.judging import load_model, losses_of
from shearing.runs.recipe import Recipe, load_recipe, overridden
from shearing.runs.stages.run import run

AT_ONCE = ["prune.duration=0 steps", "pretrain.optimizer=fresh", "model.save_dtype=fp32"]


@dataclass(frozen=True)
class Arm:
    """One way to cut.

    Attributes:
        overrides: of the recipe.
        untied: the source's head is a matrix of its own, whose values are the embedding's.
    """

    overrides: Sequence[str]
    untied: bool = False


def rotations(recipe: Recipe, *, quick: bool) -> dict[str, Arm]:
    """The cut of a sixth and of half of the hidden dimensions, in both bases."""
    arms = {}
    for width in (48, 36) if quick else (480, 288):
        size = f"target.hidden_size={width}"
        arms[f"tied {width}"] = Arm([size])
        arms[f"untied {width}"] = Arm([size], untied=True)
        arms[f"untied, rotated {width}"] = Arm([size, "prune.rotate=pca"], untied=True)
    return arms


MODES = {"rotation": rotations}


def untied_source(recipe: Recipe, *, folder: Path) -> Path:
    """The source with a head of its own: the same function with more parameters."""
    if not folder.is_dir():
        model = AutoModelForCausalLM.from_pretrained(recipe.model.source, dtype=torch.float32)
        untie(model)
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
            made = Path(beside) / "model"
            write_model(model, made)
            copy_companions(Path(recipe.model.source), to=made)
            made.rename(folder)
    return folder


def measured(recipe: Recipe, arm: Arm, *, folder: Path, steps: int) -> dict[str, Any]:
    """Losses right after the cut and after training; kept in the folder."""
    kept = folder / "losses.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not kept.is_file():
        source = [f"model.source={untied_source(recipe, folder=folder.parent / 'untied')}"] if arm.untied else []
        asked = overridden(
            recipe,
            overrides=[
                *AT_ONCE,
                *source,
                *arm.overrides,
                f"run_dir={folder / 'run'}",
                f"pretrain.duration={steps} steps",
            ],
        )
        console = Console(file=sys.stderr, width=150)
        context = RunContext(asked, console=console)
        started = time.monotonic()
        directory = run(asked, stages=("prune", "compact"), console=console)
        cut_seconds = time.monotonic() - started
        model = load_model(directory.compact, context=context)
        found = {
            "parameters": Shape.of(model.config).num_parameters(),
            "cut_seconds": cut_seconds,
            "cut": losses_of(model, context=context),
        }
        del model
        run(asked, stages=("pretrain",), console=console)
        found["trained"] = losses_of(load_model(directory.model, context=context), context=context)
        write_json(kept, found)
        shutil.rmtree(directory.path)
    return read_json(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=list(MODES))
    parser.add_argument("--quick", action="store_true", help="a tiny model that counts")
    parser.add_argument("--arms", nargs="+", default=None, help="only these")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/race-135m.yaml"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("runs/refit"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        path, output = arguments.recipe, arguments.output
        if arguments.quick:
            path, output = quick_inputs(Path(temporary)), Path(temporary) / "refit"
        recipe = load_recipe(path, overrides=[*arguments.overrides, "prune.duration=0 steps"])
        arms = MODES[arguments.mode](recipe, quick=arguments.quick)
        chosen = {name: arm for name, arm in arms.items() if arguments.arms is None or name in arguments.arms}
        rows = {
            name: measured(recipe, arm, folder=output / name.replace(", ", "-").replace(" ", "-"), steps=arguments.steps)
            for name, arm in chosen.items()
        }
    line = {
        "benchmark": f"refit {arguments.mode}",
        "quick": arguments.quick,
        "steps": arguments.steps,
        "arms": rows,
        **environment(RunContext(recipe).device),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
