"""Was learning the masks worth it: the same shape, the same total tokens, units chosen in other ways.

For every seed, `learned` is a whole run of the recipe (mask learning, cutting, continued pretraining), and `start` is
the same with its masks frozen as they start, which shows what learning adds. The baselines are those of the recipe:
they choose units by their metric, cut at once, and pretrain for as many tokens as `learned` used altogether, with the
warm-up that `learned` has. `refitted` is `activations` with the refit of the weights that stay which `learned` starts
from, so that choice and refit can be told apart. Each is a run directory, so an interrupted benchmark continues.

    python benchmarks/quality.py [key=value …] [--quick] [--recipe recipes/demo.yaml] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.data.corpus.writer import CorpusWriter
from shearing.evaluation.environment import environment
from shearing.evaluation.heldout import heldout_loss
from shearing.files.durable import read_json, write_json
from shearing.models.cutting import compact
from shearing.models.loading import load_source
from shearing.models.masked import MaskedModel
from shearing.models.shape import Shape, resolve_target
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.registry import METRICS, complete_metrics, metric_of
from shearing.pruning.structured.refitting import refit
from shearing.pruning.structured.rounding import select
from shearing.runs.context import RunContext
from shearing.runs.recipe import Recipe, load_recipe
from shearing.runs.stages.compact import compact as compact_stage
from shearing.runs.stages.pretrain import pretrain as pretrain_stage
from shearing.runs.stages.prune import prune as prune_stage
from shearing.training.device import resolve_device

OURS = ("learned", "start")
REFITTED = "refitted"
METHODS = (*OURS, *complete_metrics(), REFITTED)


def run_method(method: str, *, recipe: Recipe, console: Console) -> dict[str, Any]:
    """Runs one method to its end; returns its held-out losses after cutting and after continued pretraining."""
    context = RunContext(recipe, console=console)
    run = context.directory
    result = run.path / "quality.json"
    if result.is_file():
        return read_json(result)
    started = time.monotonic()
    if method in OURS:
        for stage, function in (("prune", prune_stage), ("compact", compact_stage)):
            if not run.is_complete(stage):
                function(context)
    elif not run.is_complete("compact"):
        cut_at_once(method, context=context)
    if not run.is_complete("pretrain"):
        pretrain_stage(context)
    losses = {"after_cutting": losses_of(run.compact, context=context), "final": losses_of(run.model, context=context)}
    write_json(result, {**losses, "seconds": time.monotonic() - started})
    return read_json(result)


def cut_at_once(method: str, *, context: RunContext) -> None:
    """Writes a run directory as if mask learning had taken no step and had chosen units by `method`."""
    recipe, run = context.recipe, context.directory
    model = load_source(recipe.model.source, device=context.device)
    source, target = Shape.of(model.config), resolve_target(recipe.target, source=model.config)
    name = "activations" if method == REFITTED else method
    text = context.calibration_batches()
    evidence = Evidence(text=text if METRICS[name].reads_text else (), target=target, seed=recipe.seed)
    scores = metric_of(name).scores(model, evidence=evidence)
    masks, selection = select(scores, source=source, target=target)
    if method == REFITTED:
        masked = MaskedModel(model)
        refit(masked, masks=masks, batches=text)
        masked.release()
    small = compact(model, masks=masks, selection=selection)
    run.compact.mkdir(parents=True, exist_ok=True)
    small.save_pretrained(run.compact)
    mixture = context.initial_mixture()
    state = {"weights": mixture.weights, "mixture_state": mixture.state_dict(), "reference": {}}
    run.prune.mkdir(exist_ok=True)
    run.mark_complete("prune", state)
    run.mark_complete("compact", {"parameters": target.num_parameters()})


def losses_of(folder: Path, *, context: RunContext) -> dict[str, float]:
    """Held-out loss per domain of a saved model, nats per token."""
    recipe = context.recipe
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(context.device).eval()
    losses = heldout_loss(
        model,
        context.corpus,
        split="test",
        tokens_per_domain=recipe.evaluation.tokens_per_domain,
        sequence_length=recipe.data.sequence_length,
        micro_batch_size=recipe.evaluation.micro_batch_size,
        precision=context.precision,
    )
    return {domain: loss.loss for domain, loss in losses.items()}


def recipe_of(path: Path, *, method: str, seed: int, output: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe of one run: constant weights, so that all methods see one mixture; equal total steps."""
    common = [*overrides, "mixture.update=constant", "mixture.initial_weights=uniform", f"seed={seed}"]
    common.append(f"run_dir={output / f'seed-{seed}' / method}")
    recipe = load_recipe(path, overrides=common)
    if method == "learned":
        return recipe
    if method == "start":
        return load_recipe(path, overrides=[*common, "prune.freeze=100%"])
    if recipe.prune.batch_size != recipe.pretrain.batch_size:
        raise SystemExit("the stages of the recipe need the same batch_size for equal total tokens")
    steps = steps_of(recipe)
    warmup = recipe.prune.in_steps(recipe.prune.warmup, sequence_length=recipe.data.sequence_length)
    alone = [f"pretrain.duration={sum(steps.values())} steps", f"pretrain.warmup={warmup} steps"]
    return load_recipe(path, overrides=[*common, *alone, "pretrain.optimizer=fresh"])


def steps_of(recipe: Recipe) -> dict[str, int]:
    """Optimiser steps of each training stage."""
    length = recipe.data.sequence_length
    return {name: stage.total_steps(sequence_length=length) for name, stage in recipe.training_stages.items()}


def summarise(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Mean and spread over seeds, per method and domain, and whether `learned` is the lowest everywhere."""
    figures: dict[str, Any] = {}
    for moment in ("after_cutting", "final"):
        table = {
            method: {domain: [result[moment][domain] for result in of_seeds] for domain in of_seeds[0][moment]}
            for method, of_seeds in results.items()
        }
        means = {m: {d: statistics.mean(v) for d, v in domains.items()} for m, domains in table.items()}
        seeds = {m: [statistics.mean(r[moment].values()) for r in of_seeds] for m, of_seeds in results.items()}
        figures[moment] = {
            method: {
                "mean": round(statistics.mean(seeds[method]), 4),
                "spread": round(statistics.stdev(seeds[method]), 4) if len(seeds[method]) > 1 else None,
                "domains": {domain: round(value, 4) for domain, value in means[method].items()},
            }
            for method in table
        }
        rivals = [method for method in table if method not in OURS]
        if "learned" in table and rivals:
            ours = means["learned"]
            figures[f"learned_wins_every_domain_{moment}"] = all(
                ours[domain] < means[rival][domain] for rival in rivals for domain in ours
            )
            best = min(rivals, key=lambda rival: statistics.mean(seeds[rival]))
            ratio = statistics.mean(seeds["learned"]) / statistics.mean(seeds[best])
            figures[f"learned_over_best_rival_{moment}"] = round(ratio, 4)
            figures[f"best_rival_{moment}"] = best
        if set(OURS) <= set(table):
            gain = statistics.mean(seeds["learned"]) - statistics.mean(seeds["start"])
            figures[f"learned_minus_start_{moment}"] = round(gain, 4)
    return figures


def print_tables(figures: dict[str, Any], *, console: Console) -> None:
    for moment, title in (("after_cutting", "right after cutting"), ("final", "after the same total tokens")):
        methods = figures[moment]
        table = Table(title=f"held-out loss, {title}")
        table.add_column("units chosen by")
        domains = list(next(iter(methods.values()))["domains"])
        for name in (*domains, "mean", "± over seeds"):
            table.add_column(name, justify="right")
        for method, row in methods.items():
            spread = "" if row["spread"] is None else f"{row['spread']:.3f}"
            values = [f"{row['domains'][domain]:.3f}" for domain in domains]
            table.add_row(method, *values, f"{row['mean']:.3f}", spread)
        console.print(table)


def quick_inputs(folder: Path) -> Path:
    """A tiny random model, two domains of random text with structure, and a recipe over them."""
    vocabulary = {f"w{i}": i for i in range(128)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=66,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    writer = CorpusWriter(
        folder / "corpus",
        vocab_size=128,
        separator_id=0,
        tokenizer="words",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    generator = np.random.default_rng(0)
    for name, stride in (("up", 1), ("down", 127)):
        with writer.domain(name, sources=["counting"], inputs="counting") as domain:
            for _ in range(200):
                first = generator.integers(1, 128)
                tokens = [int((first + stride * i) % 127 + 1) for i in range(100)]
                domain.add(" ".join(f"w{token}" for token in tokens), token_ids=tokens)
    writer.finish()
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"""
name: quick
run_dir: {folder / "run"}
model: {{source: {folder / "model"}}}
data: {{corpus: {folder / "corpus"}, sequence_length: 32}}
target: {{num_hidden_layers: 3, hidden_size: 48, intermediate_size: 64, num_attention_heads: 3}}
prune: {{duration: 60 steps, batch_size: 8, micro_batch_size: 8, learning_rate: 3e-3, mask_learning_rate: 0.1,
  sparsity_warmup: 0 steps, freeze: 50%, calibration_tokens: 2048}}
pretrain: {{duration: 60 steps, batch_size: 8, micro_batch_size: 8, learning_rate: 3e-3}}
evaluation: {{tokens_per_domain: 512}}
""")
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model on counting sequences")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        path, output = arguments.recipe, arguments.output
        if arguments.quick:
            path, output = quick_inputs(Path(temporary)), Path(temporary) / "runs"
        results: dict[str, list[dict[str, Any]]] = {}
        for seed in arguments.seeds:
            for method in arguments.methods:
                console.rule(f"{method}, seed {seed}")
                recipe = recipe_of(path, method=method, seed=seed, output=output, overrides=arguments.overrides)
                results.setdefault(method, []).append(run_method(method, recipe=recipe, console=console))
        figures = summarise(results)
        print_tables(figures, console=console)
        learned = recipe_of(path, method="learned", seed=0, output=output, overrides=arguments.overrides)
        result = {
            "benchmark": "quality",
            "quick": arguments.quick,
            "seeds": arguments.seeds,
            "steps": steps_of(learned),
            "tokens_per_step": learned.pretrain.batch_size.in_sequences(sequence_length=learned.data.sequence_length)
            * learned.data.sequence_length,
            **figures,
            "seconds": {m: round(statistics.mean(r["seconds"] for r in of), 1) for m, of in results.items()},
            **environment(resolve_device(learned.training.device)),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
