"""What update rules are worth: the same cut model, the same tokens, domain weights moved in other ways.

For every seed the source is cut once (by activations, refitted) and the same small model is trained on with
each rule: `uniform` and `proportional` stay as they are; `paper`, `released` and `robust` go by held-out losses, with
the source's own loss as the reference; `robust-newest` without averaging losses over updates; `paper-online` predicts
its reference from the run's own losses; `paper-training` goes by an average of training losses and reads no held-out
text; `paper-final` is the mix that `paper` ended with in the same seed, from the start and constant. Each is a run
directory, so an interrupted benchmark continues.

    python benchmarks/mixture_rules.py [key=value …] [--quick] [--recipe recipes/demo.yaml] [--seeds 0 1 2] [--rules …]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from structured import quick_inputs

from shearing.data.recipe import MixtureRecipe
from shearing.evaluation.environment import environment
from shearing.files.durable import read_json, write_json
from shearing.runs.context import RunContext
from shearing.runs.race.choosing import cut_of
from shearing.runs.race.judging import load_model, losses_of
from shearing.runs.race.methods import Contender
from shearing.runs.race.records import RaceFolder
from shearing.runs.race.rows import Row
from shearing.runs.recipe import Recipe, load_recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.pretrain import pretrain
from shearing.runs.stages.reference_loss import source as source_losses
from shearing.training.device import resolve_device

STATIC = ["mixture.update=constant"]
# Constants of the exponential rules have no place in a recipe of robust weights.
ROBUST = ["mixture.update=robust", "mixture.step_size=1.0", "mixture.smoothing=1e-4"]
RULES: dict[str, list[str]] = {
    "uniform": STATIC,
    "proportional": [*STATIC, "mixture.initial_weights=proportional"],
    "paper": ["mixture.update=paper"],
    "released": ["mixture.update=released"],
    "robust": ROBUST,
    "robust-newest": [*ROBUST, "mixture.loss_ema=1.0"],
    "paper-online": ["mixture.update=paper", "mixture.reference=online"],
    "paper-final": STATIC,
}
if "losses" in MixtureRecipe.model_fields:
    RULES["paper-training"] = ["mixture.update=paper", "mixture.losses=training"]

# A third of the demo's model: on a CPU more tokens teach more about mixes than more parameters do.
DEMO = [
    "target.num_hidden_layers=10",
    "target.hidden_size=288",
    "target.num_attention_heads=3",
    "target.num_key_value_heads=3",
    "target.intermediate_size=768",
    "pretrain.duration=80 steps",
    "pretrain.warmup=8 steps",
    "pretrain.learning_rate=1e-3",
    "mixture.pretrain_interval=8 steps",
    "mixture.losses=heldout",
    "mixture.reference=source",
    "distill=null",
    "evaluation.tokens_per_domain=6144",
]
QUICK = ["mixture.pretrain_interval=5 steps", "mixture.heldout_tokens=256"]


def recipe_of(path: Path, *, rule: str, seed: int, output: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe of one run; where nothing else is said weights start uniform."""
    folder = output / f"seed-{seed}"
    chosen = ["mixture.initial_weights=uniform", *RULES.get(rule, STATIC)]
    if rule == "paper-final":
        chosen.append(
            f"mixture.initial_weights={json.dumps(RunDirectory(folder / 'paper').read_complete('pretrain')['weights'])}"
        )
    fixed = [f"seed={seed}", f"run_dir={folder / rule}", "pretrain.optimizer=fresh"]
    return load_recipe(path, overrides=[*overrides, *chosen, *fixed])


def prepare_base(recipe: Recipe, *, console: Console) -> Path:
    """What all rules of a seed share: the cut model, whose folder is returned, and the source's losses as reference."""
    context = RunContext(recipe, console=console)
    run = context.directory
    row = Row(contender=Contender(method="activations", refitted=True), seed=recipe.seed, steps=0)
    cut = cut_of(row, context=context, folder=RaceFolder(path=run.path))
    reference = run.path / "reference.json"
    if not reference.is_file():
        source_losses(context, output=reference)
    return cut


def run_rule(recipe: Recipe, *, base: RunDirectory, cut: Path, console: Console) -> dict[str, Any]:
    """Trains the seed's cut model on under one rule; returns losses at the end, weights and cost."""
    context = RunContext(recipe, console=console)
    run = context.directory
    result = run.path / "rule.json"
    if result.is_file():
        return read_json(result)
    started = time.monotonic()
    if not run.is_complete("prune"):
        run.path.mkdir(parents=True, exist_ok=True)
        if not run.compact.exists():
            run.compact.symlink_to(cut.resolve(), target_is_directory=True)
        mixture = context.initial_mixture()
        run.prune.mkdir(exist_ok=True)
        reference = read_json(base.path / "reference.json")["losses"]
        state = {"weights": mixture.weights, "mixture_state": mixture.state_dict(), "reference": reference}
        run.mark_complete("prune", state)
    if not run.is_complete("pretrain"):
        pretrain(context)
    shutil.rmtree(run.checkpoints("pretrain"), ignore_errors=True)
    complete = run.read_complete("pretrain")
    write_json(
        result,
        {
            "losses": losses_of(load_model(run.model, context=context), context=context)["domains"],
            "weights": complete["weights"],
            "samples": complete["samples"],
            **_cost(run),
            "seconds": time.monotonic() - started,
        },
    )
    return read_json(result)


def _cost(run: RunDirectory) -> dict[str, float]:
    """Updates of the weights, and what share of the stage's time they took."""
    lines = [json.loads(line) for line in run.metrics("pretrain").read_text().splitlines()]
    updates = [line["seconds"] for line in lines if line.get("event") == "mixture"]
    steps = sum(line["seconds"] for line in lines if "event" not in line)
    return {"updates": len(updates), "overhead": sum(updates) / (sum(updates) + steps)}


def summarise(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means and spreads over seeds, and each rule's mean loss against uniform weights of the same seed."""
    means = {
        rule: [statistics.mean(result["losses"].values()) for result in of_seeds] for rule, of_seeds in results.items()
    }
    figures: dict[str, Any] = {}
    for rule, of_seeds in results.items():
        worst = [max(result["losses"].values()) for result in of_seeds]
        row: dict[str, Any] = {
            "domains": {
                domain: round(statistics.mean(result["losses"][domain] for result in of_seeds), 4)
                for domain in of_seeds[0]["losses"]
            },
            "mean": round(statistics.mean(means[rule]), 4),
            "spread": _spread(means[rule]),
            "worst_domain": round(statistics.mean(worst), 4),
            "worst_domain_spread": _spread(worst),
            "overhead": round(statistics.mean(result["overhead"] for result in of_seeds), 4),
            "weights": {
                domain: round(statistics.mean(result["weights"][domain] for result in of_seeds), 4)
                for domain in of_seeds[0]["weights"]
            },
            "seconds": round(statistics.mean(result["seconds"] for result in of_seeds), 1),
        }
        if "uniform" in results:
            gains = [mine - plain for mine, plain in zip(means[rule], means["uniform"], strict=True)]
            row |= {"against_uniform": round(statistics.mean(gains), 4), "against_uniform_spread": _spread(gains)}
        figures[rule] = row
    return figures


def _spread(values: Sequence[float]) -> float | None:
    return round(statistics.stdev(values), 4) if len(values) > 1 else None


def print_table(figures: dict[str, Any], *, console: Console) -> None:
    table = Table(title="held-out loss after the same tokens, by how domain weights are set")
    table.add_column("weights")
    domains = list(next(iter(figures.values()))["domains"])
    for name in (*domains, "mean", "±", "worst", "against uniform", "cost"):
        table.add_column(name, justify="right")
    for rule, row in figures.items():
        against = "" if "against_uniform" not in row else f"{row['against_uniform']:+.3f}"
        if row.get("against_uniform_spread") is not None:
            against += f" ± {row['against_uniform_spread']:.3f}"
        table.add_row(
            rule,
            *(f"{row['domains'][domain]:.3f}" for domain in domains),
            f"{row['mean']:.3f}",
            "" if row["spread"] is None else f"{row['spread']:.3f}",
            f"{row['worst_domain']:.3f}",
            against,
            f"{100 * row['overhead']:.0f} %",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model on counting sequences, one seed")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="0 1 2 unless said; with --quick 0")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--output", type=Path, default=Path("runs/mixture-rules"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    if "paper-final" in arguments.rules and "paper" not in arguments.rules:
        parser.error("paper-final needs the weights that paper ends with: add paper to --rules")
    rules = sorted(arguments.rules, key=list(RULES).index)
    seeds = arguments.seeds or ([0] if arguments.quick else [0, 1, 2])
    console = Console() if sys.stdout.isatty() else Console(width=150)
    with tempfile.TemporaryDirectory() as temporary:
        path, output, overrides = arguments.recipe, arguments.output, [*DEMO, *arguments.overrides]
        if arguments.quick:
            path, output = quick_inputs(Path(temporary)), Path(temporary) / "runs"
            overrides = [*QUICK, *arguments.overrides]
        results: dict[str, list[dict[str, Any]]] = {}
        for seed in seeds:
            base = recipe_of(path, rule="base", seed=seed, output=output, overrides=overrides)
            console.rule(f"the cut model, seed {seed}")
            cut = prepare_base(base, console=console)
            for rule in rules:
                console.rule(f"{rule}, seed {seed}")
                recipe = recipe_of(path, rule=rule, seed=seed, output=output, overrides=overrides)
                result = run_rule(recipe, base=RunDirectory(base.run_dir), cut=cut, console=console)
                results.setdefault(rule, []).append(result)
        figures = summarise(results)
        print_table(figures, console=console)
        steps = base.pretrain.total_steps(sequence_length=base.data.sequence_length)
        line = {
            "benchmark": "mixture_rules",
            "quick": arguments.quick,
            "seeds": seeds,
            "steps": steps,
            "tokens": steps * base.pretrain.tokens_per_step(sequence_length=base.data.sequence_length),
            "updates": max(result["updates"] for of_seeds in results.values() for result in of_seeds),
            "rules": figures,
            **environment(resolve_device(base.training.device)),
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
