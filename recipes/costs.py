"""What the recipes beside this file cost and give: `python recipes/costs.py docs/recipes.md` writes the tables there.

Sizes of the sources are in `sources/`, so no model is fetched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from shearing.runs.planning.hardware import Hardware
from shearing.runs.planning.plan import RunPlan, plan, what_would_fit
from shearing.runs.recipe import load_recipe

RECIPES = Path(__file__).parent
SOURCES = {
    "llama-3.1-3b": "llama-3.1-8b",
    "qwen3-1.7b": "qwen3-4b",
    "qwen3-30b-a3b-half": "qwen3-30b-a3b",
    "smollm2-0.7b": "smollm2-1.7b",
    "llama-3.2-1.2b": "llama-3.2-3b",
    "smollm3-1.5b": "smollm3-3b",
    "olmo-2-3b": "olmo-2-7b",
    "gemma-3-2b": "gemma-3-4b",
    "sheared-llama-2.7b": "llama-2-7b",
    "sheared-llama-1.3b": "llama-2-7b",
    "sheared-llama-370m": "llama-2-7b",
    "sheared-pythia-160m": "pythia-410m",
}
"""Recipe -> folder with its source's config."""

MACHINES = {"8 x H100 of 80 GB": (8, "H100"), "one RTX 4090 of 24 GB": (1, "RTX 4090")}
MFU = 0.4
BEGIN, END = "<!-- costs: made by recipes/costs.py -->", "<!-- /costs -->"


def planned(name: str, *, machine: str) -> tuple[RunPlan, list[str]] | None:
    """The plan of a recipe on a machine, and the overrides with which it fits there; None if nothing makes it fit."""
    processes, gpu = MACHINES[machine]
    hardware = Hardware.of(processes=processes, gpu=gpu, gigabytes=None, mfu=MFU)
    source = f"model.source={RECIPES / 'sources' / SOURCES[name]}"
    recipe = load_recipe(RECIPES / f"{name}.yaml", overrides=[source])
    made = plan(recipe, hardware=hardware)
    if made.advice is None:
        return made, []
    overrides = [override for way in what_would_fit(recipe, made=made) or [] for override in way.split()]
    if not overrides or "--gpus" in overrides:
        return None
    made = plan(load_recipe(RECIPES / f"{name}.yaml", overrides=[source, *overrides]), hardware=hardware)
    return None if made.advice is not None else (made, overrides)


def tables() -> Iterator[str]:
    """Lines of Markdown: what recipes give, then what they take on each machine."""
    yield "| recipe | source, parameters | result, parameters | without embeddings | mask learning | pretraining |"
    yield "|---|---|---|---|---|---|"
    for name in SOURCES:
        found = planned(name, machine=next(iter(MACHINES)))
        assert found is not None, f"{name} does not fit the first machine"
        made, _ = found
        assert made.target is not None
        prune, pretrain = (f"{stage.tokens / 1e9:.2f}B tokens" for stage in made.stages)
        sizes = f"{made.target.num_parameters():,} | {made.target.num_parameters(embeddings=False):,}"
        source = f"{SOURCES[name]}, {made.source.num_parameters():,}"
        yield f"| [{name}](../recipes/{name}.yaml) | {source} | {sizes} | {prune} | {pretrain} |"
    for machine in MACHINES:
        yield ""
        yield f"On {machine}:"
        yield ""
        yield "| recipe | hours, masks | hours, pretraining | GPU, GB | host, GB | disk, GB | add to the command |"
        yield "|---|---|---|---|---|---|---|"
        yield from (_row(name, machine=machine) for name in SOURCES)


def _row(name: str, *, machine: str) -> str:
    found = planned(name, machine=machine)
    if found is None:
        return f"| {name} | | | does not fit | | | |"
    made, overrides = found
    hours = [f"{stage.seconds / 3600:,.1f}" if stage.seconds else "" for stage in made.stages]
    held = [stage.held(made.choice) for stage in made.stages]
    memory = " and ".join(f"{stage.total / 1e9:.0f}" for stage in held)
    host = " and ".join(f"{stage.host / 1e9:.0f}" for stage in held)
    disk = max(stage.disk for stage in made.stages) / 1e9
    return f"| {name} | {hours[0]} | {hours[1]} | {memory} | {host} | {disk:,.0f} | {_code(overrides)} |"


def _code(overrides: list[str]) -> str:
    return " ".join(f"`{override}`" for override in overrides)


def embedded(document: str) -> str:
    """A document with the part between its marks replaced by the tables."""
    before, _, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"no {BEGIN} … {END} in the document")
    return f"{before}{BEGIN}\n\n" + "\n".join(tables()) + f"\n\n{END}{after}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(embedded(file.read_text(encoding="utf-8")), encoding="utf-8")
