"""What becomes of a model right after a cut and a little later: by how weights are refitted, by the stream's basis.

    python benchmarks/refit.py [--of {refit,rotation}] [--quick] [--arms NAME …] [--recipe recipes/race-135m.yaml]
                               [--output runs/refit] [key=value …]

`refit`: the same units, what stays refitted by least squares with the constant ridge and with one that held-out rows
choose, and block by block by steps of their own (`--block-steps`); against the last, with the constant ridge again, as
many FLOPs in more calibration text, and in more training.

`rotation`: the cut in the source's basis and in that of principal components, at two widths. A tied source is rotated
with a head of its own; beside it are one that has that and is not rotated, and one whose head is tied and which is as
much wider: both have as many parameters.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from kept import of_recipe, require_settings
from rich.console import Console
from safetensors.torch import load_file
from structured import quick_inputs
from transformers import AutoModelForCausalLM

from shearing.evaluation.environment import environment
from shearing.files.durable import read_json, write_json
from shearing.models.shape import Shape, resolve_target
from shearing.models.stored.companions import copy_companions
from shearing.models.stored.saving import write_model
from shearing.pruning.rotation.tied import untie
from shearing.runs.context import RunContext
from shearing.runs.race.judging import load_model, losses_of
from shearing.runs.recipe import Recipe, load_recipe, overridden
from shearing.runs.stages.choices import START_SCORES, choosing_flops, keep_scores, training_flops
from shearing.runs.stages.run import run

AT_ONCE = ["prune.duration=0 steps", "pretrain.optimizer=fresh", "model.save_dtype=fp32"]


@dataclass(frozen=True)
class Arm:
    """One way to cut.

    Attributes:
        overrides: of the recipe.
        untied: the source's head is a matrix of its own, whose values are the embedding's.
        same_units: units go by the scores of the first arm, whatever text this one reads.
        more_steps: of training.
    """

    overrides: Sequence[str]
    untied: bool = False
    same_units: bool = False
    more_steps: int = 0


def refits(recipe: Recipe, *, block_steps: int, block_rate: float) -> dict[str, Arm]:
    """Ways to refit, in the end at equal FLOPs."""
    steps = [f"prune.block_refit={{steps: {block_steps}, learning_rate: {block_rate}}}"]
    plain = _refit_flops(recipe, [])
    more = _refit_flops(recipe, steps) - plain
    tokens = recipe.pruning.prune.calibration_tokens
    another = _refit_flops(recipe, [f"prune.calibration_tokens={2 * tokens}"]) - plain
    context = RunContext(recipe)
    length = recipe.data.sequence_length
    a_step = training_flops(
        context,
        resolve_target(recipe.pruning.target, source=context.config),
        tokens=recipe.pretrain.tokens_per_step(sequence_length=length),
    )
    text = tokens + round(tokens * more / another / length) * length
    return {
        "linear": Arm([], same_units=True),
        "linear, ridge auto": Arm(["prune.refit_ridge=auto"], same_units=True),
        "blocks": Arm(steps, same_units=True),
        "linear, more text": Arm([f"prune.calibration_tokens={text}"], same_units=True),
        "linear, trained longer": Arm([], same_units=True, more_steps=round(more / a_step)),
    }


def _refit_flops(recipe: Recipe, overrides: Sequence[str]) -> float:
    context = RunContext(overridden(recipe, overrides=overrides))
    target = resolve_target(recipe.pruning.target, source=context.config)
    return choosing_flops(context, metric=None, refitted=True, target=target)


def rotations(recipe: Recipe, *, widths: Sequence[int]) -> dict[str, Arm]:
    """The cut to these widths in both bases, and to the one that has as many parameters with a tied head."""
    context = RunContext(recipe)

    def shape(width: int) -> Shape:
        target = recipe.pruning.target.model_copy(update={"hidden_size": width})
        return resolve_target(target, source=context.config)

    def as_large(parameters: int) -> int:
        step = 2 * shape(widths[0]).num_attention_heads  # what configs take
        all_widths = range(step, Shape.of(context.config).hidden_size + 1, step)
        return min(all_widths, key=lambda width: abs(shape(width).num_parameters() - parameters))

    arms = {}
    for width in widths:
        size = f"target.hidden_size={width}"
        arms[f"tied {width}"] = Arm([size])
        arms[f"untied {width}"] = Arm([size], untied=True)
        arms[f"untied, rotated {width}"] = Arm([size, "prune.rotate=pca"], untied=True)
        wider = as_large(replace(shape(width), tied=False).num_parameters())
        arms[f"tied, as large as untied {width}"] = Arm([f"target.hidden_size={wider}"])
    return arms


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
        steps += arm.more_steps
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
        prune, scores = asked.pruning.prune, folder.parent / "scores.safetensors"
        if arm.same_units and scores.is_file():
            assert prune.graded_by is not None
            target = resolve_target(asked.pruning.target, source=context.config)
            context.directory.prune.mkdir(parents=True, exist_ok=True)
            keep_scores(context, load_file(scores), metric=prune.graded_by, target=target)
        started = time.monotonic()
        directory = run(asked, stages=("prune", "compact"), console=console)
        cut_seconds = time.monotonic() - started
        if arm.same_units and not scores.is_file():
            shutil.copyfile(directory.prune / START_SCORES, scores)
        model = load_model(directory.compact, context=context)
        found = {
            "parameters": Shape.of(model.config).num_parameters(),
            "cut_seconds": cut_seconds,
            "refit_flops": _refit_flops(asked, []),
            "steps": steps,
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
    parser.add_argument("--of", choices=["refit", "rotation"], default="refit")
    parser.add_argument("--quick", action="store_true", help="a tiny model that counts")
    parser.add_argument("--arms", nargs="+", default=None, help="only these")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/race-135m.yaml"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--block-steps", type=int, default=30)
    parser.add_argument("--block-rate", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, default=Path("runs/refit"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        path, output = arguments.recipe, arguments.output
        if arguments.quick:
            path, output = quick_inputs(Path(temporary)), Path(temporary) / "refit"
        recipe = load_recipe(path, overrides=[*arguments.overrides, "prune.duration=0 steps"])
        said = {name: getattr(arguments, name) for name in ("steps", "block_steps", "block_rate")}
        require_settings(output, of_recipe(recipe) | said)
        if arguments.of == "refit":
            arms = refits(recipe, block_steps=arguments.block_steps, block_rate=arguments.block_rate)
        else:
            arms = rotations(recipe, widths=(48, 36) if arguments.quick else (480, 288))
        chosen = {name: arm for name, arm in arms.items() if arguments.arms is None or name in arguments.arms}
        rows = {
            name: measured(
                recipe, arm, folder=output / name.replace(", ", "-").replace(" ", "-"), steps=arguments.steps
            )
            for name, arm in chosen.items()
        }
    line = {
        "benchmark": "refit" if arguments.of == "refit" else "refit: rotation",
        "quick": arguments.quick,
        "steps": arguments.steps,
        "arms": rows,
        **environment(RunContext(recipe).device),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
