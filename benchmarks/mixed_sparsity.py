"""Levels by layer on a real model: msp beside uniform and the rules, for several base criteria.

    python benchmarks/mixed_sparsity.py [--quick] [--model runs/demo-data/model] [--corpus runs/demo-data/corpus]
        [--output runs/mixed-sparsity] [--criteria wanda sparsegpt] [--sparsities 0.5 0.625] [--seeds 0 1 2]

Every rule chooses among N:8 (N kept of 8) for the same share of weights, reads the same calibration text, and is pruned
the same way, layer by layer behind pruned layers. A seed draws calibration and fitness text and the search. Losses are
of test text that neither saw. Each seed is a process of its own with its share of the cores. Results are kept in
`--output` as they come, and what is there is not measured again.

The last line is JSON. `msp_over_best_rival`: msp's held-out loss over that of the best other rule, both means over
seeds; the largest over criteria and sparsities.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from shearing.data.corpus.corpus import Corpus
from shearing.evaluation.environment import environment
from shearing.evaluation.heldout import heldout_loss, macro_mean
from shearing.files.durable import read_json, write_json
from shearing.models.loading import load_source
from shearing.pruning.sparse.allocation.allocator import Allocation, Allocator, Request
from shearing.pruning.sparse.job import Job, prepare
from shearing.pruning.sparse.levels import allocator_of, request_of
from shearing.pruning.sparse.prune_layers import Method, prune_layers
from shearing.pruning.sparse.recipe import SparsifyRecipe
from shearing.pruning.sparse.search.msp import Msp
from shearing.pruning.sparse.stored.pruned_layers import PrunedLayers

RULES = ("uniform", "depth", "alpha", "owl", "rank", "redundancy", "msp")
CRITERIA = ("wanda", "sparsegpt", "magnitude")
LEVELS = [f"{kept}:8" for kept in range(1, 9)]


@dataclass(frozen=True)
class Sizes:
    """How much is read and searched.

    Attributes:
        samples, fitness_samples, seqlen: calibration and fitness text.
        heldout: tokens per domain.
        population, offspring, generations: of the search.
    """

    samples: int
    fitness_samples: int
    seqlen: int
    heldout: int
    population: int
    offspring: int
    generations: int


QUICK = Sizes(samples=4, fitness_samples=4, seqlen=64, heldout=256, population=4, offspring=4, generations=2)
FULL = Sizes(samples=16, fitness_samples=12, seqlen=128, heldout=768, population=12, offspring=16, generations=8)


@dataclass(frozen=True)
class Fixed:
    """An allocation that is known already, as a start of the search."""

    allocation: Allocation

    def allocate(self, request: Request) -> Allocation:
        """The allocation itself."""
        del request
        return self.allocation


class Seed:
    """All measurements of one seed."""

    def __init__(self, arguments: argparse.Namespace, *, sizes: Sizes, seed: int) -> None:
        self._arguments, self._sizes, self._seed = arguments, sizes, seed
        self._folder: Path = arguments.output / f"seed-{seed}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._console = Console()
        self._corpus = Corpus.open(arguments.corpus)
        self._rivals: dict[float, dict[str, Allocator]] = {}

    def run(self) -> None:
        """Measure what has no file yet."""
        for sparsity in self._arguments.sparsities:
            for criterion in self._arguments.criteria:
                for rule in RULES:
                    path = self._folder / f"{criterion}-{sparsity}-{rule}.json"
                    if not path.is_file():
                        result = self._measure(criterion, sparsity, rule)
                        write_json(path, result)
                        self._console.print(
                            f"seed {self._seed}, {criterion} {100 * sparsity:g} %, {rule}: loss {result['loss']:.4f}, "
                            f"{result['seconds']:.0f} s to choose",
                            highlight=False,
                        )

    def _measure(self, criterion: str, sparsity: float, rule: str) -> dict[str, Any]:
        work = self._folder / "work"
        recipe = self._recipe(criterion, sparsity, rule, output=work)
        job = prepare(recipe, folder=work)
        self._share_levels(work, criterion=criterion)
        allocator = self._allocator(recipe, job=job, sparsity=sparsity)
        started = time.perf_counter()
        allocation = allocator.allocate(request_of(recipe, job=job, console=Console(quiet=True)))
        seconds = time.perf_counter() - started
        self._rivals.setdefault(sparsity, {})[rule] = Fixed(allocation)
        method = Method(job.criterion, job.reconstruction, allocation.patterns, recipe.damping, recipe.true_sequential)
        pruned_layers = PrunedLayers(work / "blocks")
        prune_layers(
            job.source, method=method, calibration=job.calibration, compute=job.compute, pruned_layers=pruned_layers
        )
        losses = self._evaluate(pruned_layers, job=job)
        shutil.rmtree(work)
        return {
            **losses,
            "seconds": seconds,
            "patterns": {name: str(pattern) for name, pattern in allocation.patterns.items()},
            "facts": dict(allocation.facts),
        }

    def _share_levels(self, work: Path, *, criterion: str) -> None:
        """Every matrix at every level is the same for all sparsities."""
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        kept = self._folder / f"levels-{criterion}"
        kept.mkdir(exist_ok=True)
        (work / "levels").symlink_to(kept.resolve())

    def _allocator(self, recipe: SparsifyRecipe, *, job: Job, sparsity: float) -> Allocator:
        """Rules other than owl and redundancy, which look at a criterion's model, are the same for all criteria."""
        known = self._rivals.get(sparsity, {})
        if recipe.allocation in ("alpha", "rank") and recipe.allocation in known:
            return known[str(recipe.allocation)]
        allocator = allocator_of(recipe, job=job)
        if isinstance(allocator, Msp):
            return replace(allocator, starts={name: known.get(name, rule) for name, rule in allocator.starts.items()})
        return allocator

    def _recipe(self, criterion: str, sparsity: float, rule: str, *, output: Path) -> SparsifyRecipe:
        sizes = self._sizes
        return SparsifyRecipe.model_validate(
            {
                "model": str(self._arguments.model),
                "output": output,
                "criterion": criterion,
                "sparsity": sparsity,
                "allocation": rule,
                "levels": LEVELS,
                "calibration": [self._arguments.corpus],
                "samples": sizes.samples,
                "seqlen": sizes.seqlen,
                "seed": self._seed,
                "search": {
                    "population": sizes.population,
                    "offspring": sizes.offspring,
                    "generations": sizes.generations,
                    "fitness_samples": sizes.fitness_samples,
                },
            }
        )

    def _evaluate(self, pruned_layers: PrunedLayers, *, job: Job) -> dict[str, Any]:
        model = load_source(str(self._arguments.model))
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for layer in range(job.source.config.num_hidden_layers):
                for name, weight in pruned_layers.weights(layer).items():
                    parameters[name].copy_(weight)
        losses = heldout_loss(
            model,
            self._corpus,
            split="test",
            tokens_per_domain=self._sizes.heldout,
            sequence_length=self._sizes.seqlen,
            micro_batch_size=8,
        )
        mean = macro_mean(losses)
        return {
            "loss": mean.loss,
            "perplexity": mean.perplexity,
            "domains": {name: of_domain.loss for name, of_domain in losses.items()},
        }


def require_same_settings(output: Path, settings: dict[str, Any]) -> None:
    """What was measured with other text must not be taken for this run's."""
    path = output / "settings.json"
    if not path.is_file():
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    elif (earlier := read_json(path)) != settings:
        raise SystemExit(f"{output} holds results of {earlier}: choose another --output")


def run_seeds(arguments: argparse.Namespace) -> None:
    """Seeds side by side, each in a process of its own."""
    threads = max(1, (os.cpu_count() or 1) // len(arguments.seeds))
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    commands = [[sys.executable, __file__, *sys.argv[1:], "--seed", str(seed)] for seed in arguments.seeds]
    running = [subprocess.Popen(command, env=variables) for command in commands]
    if codes := [code for code in [process.wait() for process in running] if code]:
        sys.exit(codes[0])


def table_of(results: dict[tuple[str, float, str], list[dict[str, Any]]], *, seeds: Sequence[int]) -> Table:
    """Held-out loss by criterion, sparsity and rule, mean and standard deviation over seeds."""
    table = Table(title=f"held-out loss, nats per token; mean of {len(seeds)} seeds, ± their standard deviation")
    table.add_column("criterion, removed", no_wrap=True)
    for rule in RULES:
        table.add_column(rule, justify="right", no_wrap=True)
    for criterion, sparsity in dict.fromkeys((criterion, sparsity) for criterion, sparsity, _ in results):
        cells = []
        for rule in RULES:
            losses = [result["loss"] for result in results[criterion, sparsity, rule]]
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            cells.append(f"{statistics.mean(losses):.3f} ± {spread:.3f}")
        table.add_row(f"{criterion} {100 * sparsity:g} %", *cells)
    return table


def compare(results: dict[tuple[str, float, str], list[dict[str, Any]]]) -> dict[str, Any]:
    """Msp against the best other rule, for each criterion and sparsity."""
    found: dict[str, Any] = {}
    for criterion, sparsity in dict.fromkeys((criterion, sparsity) for criterion, sparsity, _ in results):
        means = {rule: statistics.mean(each["loss"] for each in results[criterion, sparsity, rule]) for rule in RULES}
        best = min((rule for rule in RULES if rule != "msp"), key=means.__getitem__)
        searches = [each["facts"] for each in results[criterion, sparsity, "msp"]]
        found[f"{criterion} {100 * sparsity:g} %"] = {
            "losses": {rule: round(loss, 4) for rule, loss in means.items()},
            "by_seed": {
                rule: [round(each["loss"], 4) for each in results[criterion, sparsity, rule]] for rule in RULES
            },
            "best_rival": best,
            "msp_over_best_rival": round(means["msp"] / means[best], 4),
            "forward_passes": [search["forward_passes"] for search in searches],
            "tokens": [search["tokens"] for search in searches],
            "search_seconds": [search["seconds"] for search in searches],
            "seconds_to_choose": {
                rule: round(statistics.mean(each["seconds"] for each in results[criterion, sparsity, rule]), 1)
                for rule in RULES
            },
            "winner_descends_from": [search["winner_descends_from"] for search in searches],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, one criterion, one sparsity, little text")
    parser.add_argument("--model", type=Path, default=Path("runs/demo-data/model"))
    parser.add_argument("--corpus", type=Path, default=Path("runs/demo-data/corpus"))
    parser.add_argument("--output", type=Path, help="runs/mixed-sparsity, or with --quick runs/mixed-sparsity-quick")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, help="wanda sparsegpt; quick: wanda")
    parser.add_argument("--sparsities", nargs="+", type=float, help="0.5 0.625; quick: 0.5")
    parser.add_argument("--seeds", nargs="+", type=int, help="0 1 2; quick: 0")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        raise SystemExit(f"no model in {arguments.model}: python -m data_tools.demo --output runs/demo-data")
    quick, sizes = arguments.quick, QUICK if arguments.quick else FULL
    arguments.criteria = arguments.criteria or (["wanda"] if quick else ["wanda", "sparsegpt"])
    arguments.sparsities = arguments.sparsities or ([0.5] if quick else [0.5, 0.625])
    arguments.seeds = arguments.seeds or ([0] if quick else [0, 1, 2])
    arguments.output = arguments.output or Path("runs/mixed-sparsity-quick" if quick else "runs/mixed-sparsity")
    transformers.utils.logging.disable_progress_bar()
    require_same_settings(
        arguments.output, {"sizes": vars(sizes), "model": str(arguments.model), "corpus": str(arguments.corpus)}
    )
    if arguments.seed is not None:
        Seed(arguments, sizes=sizes, seed=arguments.seed).run()
        return
    run_seeds(arguments)
    results = {
        (criterion, sparsity, rule): [
            read_json(arguments.output / f"seed-{seed}" / f"{criterion}-{sparsity}-{rule}.json")
            for seed in arguments.seeds
        ]
        for sparsity in arguments.sparsities
        for criterion in arguments.criteria
        for rule in RULES
    }
    console = Console()
    console.print(table_of(results, seeds=arguments.seeds))
    found = compare(results)
    result = {
        "benchmark": "mixed_sparsity",
        "quick": quick,
        "seeds": arguments.seeds,
        "sizes": vars(sizes),
        "levels": LEVELS,
        "msp_over_best_rival": max(each["msp_over_best_rival"] for each in found.values()),
        "results": found,
        **environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
