"""Whether a search pays: the shape that it finds against the recipe's own, trained from the source at equal tokens.

In full: `shear search` over the demo's recipe at its size, then the best shape and the demo's own, three seeds each,
by the demo's schedule; with `--also` other shapes that the recipe names, too. The search keeps its candidates in the
output folder, and single runs too, so all of it goes on where it was.

    python benchmarks/search.py [--quick] [--recipe recipes/demo.yaml] [--tokens 195k] [--seeds 0 1 2] [--output DIR]
        [--also NAME …] [key=value …]

With other seeds another process can make the runs of those at the same time, in the same folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kept import of_recipe, require_settings
from rich.console import Console
from structured import quick_inputs

from shearing.files.durable import read_json, write_json
from shearing.models.shape import SIZE_NAMES
from shearing.runs.context import RunContext
from shearing.runs.race.judging import load_model, losses_of
from shearing.runs.recipe import Recipe, load_recipe, overridden
from shearing.runs.search.plan import STAGES
from shearing.runs.search.search import SearchSettings, search
from shearing.runs.stages.run import run

SEEDS = (0, 1, 2)
QUICK = ["search.multiple_of=4", "search.tolerance=0.05", "search.rounds=[6 x 1K, 3 x 3K, 2 x 6K]", "search.dtype=fp32"]


def loss_on_test(recipe: Recipe, *, target: Sequence[str], seed: int, tokens: str, folder: Path) -> dict[str, Any]:
    """What a shape is worth by the recipe's own schedule: an ordinary run, and the losses of its model."""
    kept = folder / "losses.json"
    if not kept.is_file():
        overrides = [*target, f"seed={seed}", f"run_dir={folder}", f"pretrain.duration={tokens} tokens", "search=null"]
        asked = overridden(recipe, overrides=[*overrides, "model.save_dtype=fp32"])
        console = Console(quiet=True)
        directory = run(asked, stages=STAGES, console=console)
        context = RunContext(asked, console=console)
        write_json(kept, losses_of(load_model(directory.model, context=context), context=context))
    return read_json(kept)


def _mean_and_spread(differences: Sequence[float], *, of: str) -> dict[str, float | None]:
    """Of what a shape differs by from the default with each seed; the spread is the mean's standard error."""
    spread = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return {of: statistics.mean(differences), "spread": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model that counts, one seed")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--tokens", default="195k", help="of each of the runs that are compared")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the runs that are compared")
    parser.add_argument("--output", type=Path, default=Path("runs/search"))
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="NAME", help="of search.candidates: compared besides the best"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        path, output, tokens, overrides = arguments.recipe, arguments.output, arguments.tokens, arguments.overrides
        seeds = arguments.seeds
        if arguments.quick:
            path, output, tokens, seeds = quick_inputs(Path(temporary)), Path(temporary) / "search", "6K", (0,)
            overrides = [*QUICK, "prune.duration=0 steps", *overrides]
        recipe = load_recipe(path, overrides=overrides)
        names = {} if recipe.search is None else recipe.search.candidates or {}
        if unknown := sorted({*arguments.also} - names.keys()):
            parser.error(f"--also: {', '.join(unknown)}: not among search.candidates ({', '.join(names) or 'none'})")
        require_settings(output, of_recipe(recipe) | {"tokens": tokens})
        found = search(SearchSettings(recipe=recipe, output=output / "candidates"), console=Console(width=150))
        candidates = {line["name"]: line for line in found["candidates"]}
        best = candidates[found["winner"]]
        shapes = {"searched": best, **{name: candidates[name] for name in arguments.also}}
        targets = {
            "default": [],
            **{name: [f"target.{size}={shape[size]}" for size in SIZE_NAMES] for name, shape in shapes.items()},
        }
        differences: dict[str, list[float]] = {name: [] for name in shapes}
        for seed in seeds:
            losses = {
                name: loss_on_test(
                    recipe, target=target, seed=seed, tokens=tokens, folder=output / f"{name}-seed{seed}"
                )
                for name, target in targets.items()
            }
            for name, of_shape in differences.items():
                of_shape.append(losses[name]["mean"] - losses["default"]["mean"])
    line = {
        "benchmark": "search",
        "quick": arguments.quick,
        "searched": {name: best[name] for name in ("name", "parameters")},
        **_mean_and_spread(differences.pop("searched"), of="searched_minus_default"),
        "also": {name: _mean_and_spread(found, of="minus_default") for name, found in differences.items()},
        "seeds": len(seeds),
        "search_tokens": found["tokens"],
        "prediction_error": found["prediction_error"],
        **found["environment"],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
