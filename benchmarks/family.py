"""Whether a family pays: each size out of one training against the same size trained alone at equal tokens.

In full: the recipe's run, and for each of its sizes, the largest too, the run that has that size as its target and no
family; everything else is the same, samples and their order included. `--cost 0.6` makes a second family, which is
trained for longer: until it has cost that share of the FLOPs of the runs alone. Runs stay in the output folder, so all
of it goes on where it was.

    python benchmarks/family.py [--quick] [--cost SHARE] [--recipe recipes/family-135m.yaml] [--output DIR]
        [key=value …]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kept import of_recipe, require_settings
from rich.console import Console
from structured import quick_inputs

from shearing.evaluation.environment import environment
from shearing.files.durable import read_json, write_json
from shearing.models.shape import SIZE_NAMES
from shearing.pruning.structured.masking.recipe import WHOLE
from shearing.runs.context import RunContext
from shearing.runs.continuation.family import family_shapes
from shearing.runs.planning.phases import phases
from shearing.runs.planning.plan import Hardware, plan
from shearing.runs.race.judging import load_model, losses_of
from shearing.runs.recipe import Recipe, load_recipe, overridden
from shearing.runs.run_directory import RunDirectory
from shearing.runs.search.plan import STAGES
from shearing.runs.stages.run import run

QUICK = [
    "prune.duration=0 steps",
    "prune.calibration_tokens=1024",
    "pretrain.duration=120 steps",
    "pretrain.micro_batch_size=2",
    "pretrain.learning_rate=3e-3",
    "pretrain.warmup=8 steps",
    "mixture.update=constant",
    "target={num_hidden_layers: 4, hidden_size: 60, intermediate_size: 80}",
    "family.sizes={medium: {num_hidden_layers: 3, hidden_size: 54}, small: {hidden_size: 48, intermediate_size: 64}}",
    "family.draws=4",
    "family.calibration_tokens=1024",
    "distill={weight: 0.5, domains: all}",
]


def flops_of_run(recipe: Recipe) -> float:
    """Of everything up to the last model, as `shear plan` counts: what judges it is left out."""
    made = plan(recipe, hardware=Hardware.of(processes=1, gpu=None, gigabytes=None, mfu=0.4))
    parts = [phase for phase in phases(recipe, made=made) if not phase.what.startswith("evaluate")]
    return sum((phase.flops or 0.0) * phase.times for phase in parts)


def seconds_of(directory: RunDirectory) -> float:
    """Of the steps of a run."""
    lines = map(json.loads, directory.metrics("pretrain").read_text(encoding="utf-8").splitlines())
    return sum(line["seconds"] for line in lines if "event" not in line)


def judged(recipe: Recipe, *, models: Mapping[str, Path]) -> dict[str, Any]:
    """A recipe run to its last model, and the losses of models of it, by name; kept in the run's folder."""
    directory, console = RunDirectory(recipe.run_dir), Console(quiet=True)
    kept = directory.path / "losses.json"
    if not kept.is_file():
        run(recipe, stages=STAGES, console=console)
        context = RunContext(recipe, console=console)
        losses, parameters = {}, {}
        for name, path in models.items():
            model = load_model(path, context=context)
            losses[name], parameters[name] = losses_of(model, context=context), model.num_parameters()
        found = {"losses": losses, "parameters": parameters}
        write_json(kept, found | {"seconds": seconds_of(directory), "flops": flops_of_run(recipe)})
    return read_json(kept)


def steps_for(recipe: Recipe, *, flops: float) -> int:
    """Of continued pretraining, with which a recipe's run costs this much."""
    steps = recipe.pretrain.total_steps(sequence_length=recipe.data.sequence_length)
    once, twice = (flops_of_run(_trained_for(recipe, steps=each)) for each in (steps, 2 * steps))
    return steps + round((flops - once) / (twice - once) * steps)


def _trained_for(recipe: Recipe, *, steps: int) -> Recipe:
    return overridden(recipe, overrides=[f"pretrain.duration={steps} steps"])


def of_family(recipe: Recipe, *, shapes: Iterable[str]) -> dict[str, Any]:
    """`judged` of all sizes of a recipe's run."""
    directory = RunDirectory(recipe.run_dir)
    return judged(recipe, models={WHOLE: directory.model, **{name: directory.family / name for name in shapes}})


def compare(path: Path, *, overrides: Sequence[str], output: Path, cost: float | None = None) -> dict[str, Any]:
    """The family and a run alone of each of its sizes, and the family that cost that share of these."""
    recipe = load_recipe(path, overrides=[*overrides, f"run_dir={output / 'family'}", "model.save_dtype=fp32"])
    require_settings(output, of_recipe(recipe))
    context = RunContext(recipe, console=Console(quiet=True))
    shapes = family_shapes(recipe, source=context.config)
    together = of_family(recipe, shapes=shapes)
    alone = {}
    for name in (WHOLE, *shapes):
        sizes = {key: getattr(shapes[name], key) for key in SIZE_NAMES} if name in shapes else {}
        changed = [f"target.{key}={value}" for key, value in sizes.items()]
        one = overridden(recipe, overrides=[*changed, "family=null", f"run_dir={output / f'alone-{name}'}"])
        alone[name] = judged(one, models={"alone": RunDirectory(one.run_dir).model})
    apart = sum(each["flops"] for each in alone.values())
    at_cost = None
    if cost is not None:
        steps = steps_for(recipe, flops=cost * apart)
        folder = output / f"family-cost-{cost}"
        require_settings(folder, {"steps": steps})
        longer = overridden(_trained_for(recipe, steps=steps), overrides=[f"run_dir={folder}"])
        sizes = _beside(of_family(longer, shapes=shapes), alone=alone)
        at_cost = {"cost": cost, "steps": steps, "sizes": sizes, **worst_of(sizes)}
    return {
        "sizes": _beside(together, alone=alone),
        "at_cost": at_cost,
        "cost_over_apart": together["flops"] / apart,
        "seconds_over_apart": together["seconds"] / sum(each["seconds"] for each in alone.values()),
        "tokens": recipe.pretrain.total_steps(sequence_length=recipe.data.sequence_length)
        * recipe.pretrain.tokens_per_step(sequence_length=recipe.data.sequence_length),
        "device": environment(context.device),
    }


def _beside(together: Mapping[str, Any], *, alone: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {
            "parameters": together["parameters"][name],
            "family": _means(losses),
            "alone": _means(alone[name]["losses"]["alone"]),
        }
        for name, losses in together["losses"].items()
    }


def _means(losses: Mapping[str, Any]) -> dict[str, float]:
    return {name: losses[name] for name in ("mean", "outside_mean") if name in losses}


def worst_of(sizes: Mapping[str, Any]) -> dict[str, float | None]:
    """Largest differences of the means, family minus alone; None where it was not measured."""

    def worst(of: str) -> float | None:
        found = [each["family"][of] - each["alone"][of] for each in sizes.values() if of in each["family"]]
        return max(found) if found else None

    return {"worst_family_minus_alone": worst("mean"), "worst_outside": worst("outside_mean")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model that counts")
    parser.add_argument("--cost", type=float, help="also train a family until it has cost this share of the runs alone")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/family-135m.yaml"))
    parser.add_argument("--output", type=Path, default=Path("runs/family"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        path, output, overrides = arguments.recipe, arguments.output, arguments.overrides
        if arguments.quick:
            path, output, overrides = quick_inputs(Path(temporary)), Path(temporary), [*QUICK, *overrides]
        found = compare(path, overrides=overrides, output=output, cost=arguments.cost)
    line = {
        "benchmark": "family",
        "quick": arguments.quick,
        **worst_of(found["sizes"]),
        "cost_over_apart": found["cost_over_apart"],
        "seconds_over_apart": found["seconds_over_apart"],
        "tokens": found["tokens"],
        "sizes": found["sizes"],
        "at_cost": found["at_cost"],
        **found["device"],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
