"""What listening to a teacher brings: the same cut model trained on, with and without, at equal tokens and equal FLOPs.

For every seed the recipe's mask learning and cutting are done once; each row then trains that model with one way of
distilling, for as many tokens as plain cross-entropy (`ce`), and once more for as many FLOPs: 6 N_S a token for a
student of N_S parameters, and 2 N_T more for a teacher of N_T, but in the row `cached`, whose teacher was asked before.
The validation split chooses the best row; the losses that judge are of the test split of the domains that are trained
on, and of text of none (`evaluation.outside`). A row is a run and a file: an interrupted benchmark continues.

    python benchmarks/distillation.py [key=value …] [--quick] [--recipe recipes/demo.yaml] [--seeds 0] [--steps 30 190]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import of_recipe, require_settings
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import HeldOutSplit, tokenizer_fingerprint
from shearing.data.corpus.writer import CorpusWriter
from shearing.evaluation.environment import environment
from shearing.evaluation.heldout import heldout_loss
from shearing.files.durable import read_json, write_json, write_text
from shearing.models.loading import load_config, load_source
from shearing.models.shape import Shape
from shearing.runs.context import RunContext
from shearing.runs.planning.hardware import forward_flops_per_token, training_flops_per_token
from shearing.runs.race.results.summary import paired
from shearing.runs.recipe import Recipe, load_recipe
from shearing.runs.stages.compact import compact
from shearing.runs.stages.pretrain import pretrain
from shearing.runs.stages.prune import prune
from shearing.runs.teacher_cache import Asked, write
from shearing.training.device import resolve_device

CE = "ce"
CACHED = "cached by domain 0.5, margin 1"
ROWS: dict[str, dict[str, Any] | None] = {
    CE: None,
    "constant 0.5": {"weight": 0.5, "domains": "all"},
    "constant 0.9": {"weight": 0.9, "domains": "all"},
    "by domain 0.5": {"weight": 0.5, "domains": "auto", "margin": 0.5},
    "by domain 0.9": {"weight": 0.9, "domains": "auto", "margin": 0.5},
    "by domain 0.5, margin 1": {"weight": 0.5, "domains": "auto", "margin": 1.0},
    CACHED: {"weight": 0.5, "domains": "auto", "margin": 1.0},
    "by domain 0.9, margin 2": {"weight": 0.9, "domains": "auto", "margin": 2.0},
    "by domain and entropy 0.9": {"weight": 0.9, "domains": "auto", "skip_low_entropy": 0.15},
    "by label 0.9": {"weight": 0.9, "domains": "all", "by_label": True},
    "by domain 0.5, streams too": {"weight": 0.5, "domains": "auto", "hidden": {}},
    "by domain and label 0.9": {"weight": 0.9, "domains": "auto", "by_label": True},
}
"""Ways to train, by what `distill` is."""
EQUAL = ("tokens", "flops")


class Bench:
    """One seed: the cut model, and rows that train it.

    Args:
        recipe: the recipe of the cut.
        folder: of the seed.
        steps: of continued pretraining by cross-entropy alone.
        warmup: steps of its warm-up.
        console: where progress goes.
    """

    def __init__(self, recipe: Recipe, *, folder: Path, steps: int, warmup: int, console: Console) -> None:
        self.folder, self.steps, self.warmup, self.console = folder, steps, warmup, console
        start = recipe.model_copy(update={"run_dir": folder / "start"})
        context = RunContext(start, console=console)
        for stage, function in (("prune", prune), ("compact", compact)):
            if not context.directory.is_complete(stage):
                function(context)
        self.recipe, self.seed, self.cut = recipe, recipe.seed, context.directory.compact
        self.teacher = Shape.of(context.config)
        self.student = Shape.of(load_config(str(self.cut)))

    def flops_ratio(self, row: str) -> float:
        """FLOPs of a token over those of cross-entropy alone."""
        length, settings = self.recipe.data.sequence_length, ROWS[row]
        own = training_flops_per_token(self.student, sequence_length=length)
        if settings is None or row == CACHED:
            return 1.0
        again = 2.0 * self.teacher.vocab_size * self.teacher.hidden_size if settings.get("skip_low_entropy") else 0.0
        return (own + forward_flops_per_token(self.teacher, sequence_length=length) + again) / own

    def run(self, row: str, *, equal: str) -> dict[str, Any]:
        """Losses by domain and seconds a step of a row, from its file if it is there."""
        if row in (CE, CACHED):
            equal = "tokens"
        steps = self.steps if equal == "tokens" else max(1, round(self.steps / self.flops_ratio(row)))
        folder = self.folder / f"{self.steps} steps" / f"{row}, equal {equal}"
        result = folder / "row.json"
        if not result.is_file():
            self.console.rule(f"{row}, {steps} steps")
            context = RunContext(self._recipe_of(row, steps=steps, run_dir=folder), console=self.console)
            if row == CACHED:
                self._ask(context.recipe)
            pretrain(context)
            seconds = [line["seconds"] for line in _lines(context.directory.pretrain / "metrics.jsonl")]
            model = load_source(str(context.directory.model), device=context.device, dtype=torch.float32)
            write_json(
                result,
                {
                    "validation": self._losses(model, corpus=context.corpus, split="validation", context=context),
                    "losses": self._losses(model, corpus=context.corpus, split="test", context=context),
                    "outside": {}
                    if context.outside is None
                    else self._losses(model, corpus=context.outside, split="test", context=context),
                    "steps": steps,
                    "distill": ROWS[row],
                    "seconds": statistics.median(seconds[1:] or seconds),
                },
            )
        found = read_json(result)
        # What `distill` is here; earlier files do not say it.
        if (settings := found.get("distill", ROWS[row])) != ROWS[row]:
            raise SystemExit(f"{folder} is of distill: {settings} and not {ROWS[row]}: choose another --output")
        return found

    def _ask(self, recipe: Recipe) -> None:
        """Keep what the teacher says of the rows that a row of the table reads."""
        assert recipe.distill is not None
        assert recipe.distill.cache is not None
        asked = Asked(
            model=recipe.distill.teacher,
            revision=recipe.distill.revision,
            corpus=recipe.data.corpus,
            domains=recipe.data.domains,
            output=recipe.distill.cache,
            sequence_length=recipe.data.sequence_length,
            attention=recipe.data.attention,
            recipe=recipe,
            training=recipe.training,
        )
        write(asked, console=self.console)

    def _losses(
        self, model: PreTrainedModel, *, corpus: Corpus, split: HeldOutSplit, context: RunContext
    ) -> dict[str, float]:
        recipe = self.recipe
        losses = heldout_loss(
            model,
            corpus,
            split=split,
            tokens_per_domain=recipe.evaluation.tokens_per_domain,
            sequence_length=recipe.data.sequence_length,
            micro_batch_size=recipe.evaluation.micro_batch_size,
            precision=context.precision,
        )
        return {domain: loss.loss for domain, loss in losses.items()}

    def _recipe_of(self, row: str, *, steps: int, run_dir: Path) -> Recipe:
        settings = ROWS[row]
        values = self.recipe.model_dump(mode="json")
        values |= {"run_dir": str(run_dir), "target": None, "prune": None, "sparsify": None, "one_schedule": False}
        values["model"]["source"] = str(self.cut)
        values["pretrain"] |= {"duration": f"{steps} steps", "warmup": f"{min(self.warmup, steps)} steps"}
        values["training"]["log_interval"] = 1
        source = self.recipe.model
        teacher = {"teacher": source.source, "revision": source.revision}
        values["distill"] = None if settings is None else {**teacher, **settings}
        if row == CACHED:
            values["distill"]["cache"] = str(run_dir.with_name("teacher-cache"))
        return Recipe.model_validate(values)


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "event" not in line]


Results = dict[tuple[str, str], dict[int, dict[str, Any]]]
"""(row, what is equal) -> seed -> content of its file."""


def summarise(results: Results, *, ratios: dict[str, float]) -> dict[str, Any]:
    """Figures of each row with its paired differences to cross-entropy, and the best row beside it.

    The best is the one of lowest loss on validation text, at equal tokens: test text judges, and chooses nothing.
    Spreads are standard errors of the mean.
    """
    plain = results[CE, "tokens"]
    rows: dict[str, Any] = {}
    for (row, equal), of_seeds in results.items():
        domains = {
            domain: statistics.mean(each["losses"][domain] for each in of_seeds.values())
            for domain in next(iter(of_seeds.values()))["losses"]
        }
        rows[f"{row}, equal {equal}"] = {
            "steps": next(iter(of_seeds.values()))["steps"],
            "domains": domains,
            "validation": statistics.mean(_means(of_seeds, "validation").values()),
            "inside": statistics.mean(_means(of_seeds, "losses").values()),
            "minus_ce": paired(_means(of_seeds, "losses"), _means(plain, "losses")),
            "outside": statistics.mean(outside) if (outside := _means(of_seeds, "outside").values()) else None,
            "minus_ce_outside": paired(_means(of_seeds, "outside"), _means(plain, "outside")),
            "seconds": statistics.median(each["seconds"] for each in of_seeds.values()),
        }
    rivals = [row for row, equal in results if row != CE and equal == "tokens"]
    best = min(rivals, key=lambda row: rows[f"{row}, equal tokens"]["validation"])
    listening, short, alone, cached = (
        rows.get(name)
        for name in (
            f"{best}, equal tokens",
            f"{best}, equal flops",
            f"{CE}, equal tokens",
            f"{CACHED}, equal tokens",
        )
    )
    return {
        "rows": rows,
        "best": best,
        "kd_minus_ce": listening["minus_ce"],
        "kd_minus_ce_outside": listening["minus_ce_outside"],
        "kd_minus_ce_equal_flops": short and short["minus_ce"],
        "kd_minus_ce_equal_flops_outside": short and short["minus_ce_outside"],
        "worst_domain": max(listening["domains"][name] - alone["domains"][name] for name in alone["domains"]),
        "cached_over_ce_time": cached and cached["seconds"] / alone["seconds"],
        "kd_step_over_its_flops": listening["seconds"] / alone["seconds"] / ratios[best],
    }


def _means(of_seeds: dict[int, dict[str, Any]], kind: str) -> dict[int, float]:
    """Mean over the domains of `validation`, `losses` or `outside`, by seed; empty where there are none."""
    return {seed: statistics.mean(each[kind].values()) for seed, each in of_seeds.items() if each[kind]}


def table_of(figures: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of one length."""
    rows = figures["rows"]
    domains = list(next(iter(rows.values()))["domains"])
    head = ["trained by", "steps", "validation", *domains, "mean", "- ce", "outside", "- ce", "s/step"]
    cells = [
        [
            name,
            str(row["steps"]),
            f"{row['validation']:.3f}",
            *(f"{row['domains'][domain]:.3f}" for domain in domains),
            f"{row['inside']:.3f}",
            _difference(row["minus_ce"]),
            "–" if row["outside"] is None else f"{row['outside']:.3f}",
            _difference(row["minus_ce_outside"]),
            f"{row['seconds']:.2f}",
        ]
        for name, row in rows.items()
    ]
    return head, cells


def _difference(gains: dict[str, Any] | None) -> str:
    if gains is None:
        return "–"
    return f"{gains['mean']:+.3f}" + ("" if gains["spread"] is None else f" ± {gains['spread']:.3f}")


def print_table(figures: dict[str, Any], *, console: Console) -> None:
    """Of one length."""
    table = Table(
        title="loss, nats per token: mean of validation text, then test text; paired differences ± standard error"
    )
    head, cells = table_of(figures)
    for name in head:
        table.add_column(name, justify="left" if name == head[0] else "right")
    for row in cells:
        table.add_row(*row)
    console.print(table)


def markdown_of(figures: dict[str, Any]) -> str:
    """The same for documents."""
    head, cells = table_of(figures)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *cells))


def quick_inputs(folder: Path, *, steps: int = 300) -> Path:
    """A tiny model trained for so many steps to count, text that counts with mistakes, and a recipe over them."""
    vocabulary = {f"w{i}": i for i in range(64)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6}
    sizes |= {"num_key_value_heads": 3, "head_dim": 16}
    config = LlamaConfig(vocab_size=64, **sizes, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")
    generator = np.random.default_rng(0)
    for corpus, strides in (("corpus", {"up": 1, "down": 62}), ("outside", {"threes": 3})):
        writer = CorpusWriter(
            folder / corpus,
            vocab_size=64,
            separator_id=0,
            tokenizer="words",
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        )
        for name, stride in strides.items():
            with writer.domain(name, sources=["counting"], inputs="counting") as domain:
                for _ in range(300):
                    first, slips = generator.integers(0, 63), generator.integers(0, 63, 100)
                    counted = [(first + stride * i) % 63 for i in range(100)]
                    tokens = [int(slips[i] if slips[i] % 8 == 0 else counted[i]) + 1 for i in range(100)]
                    domain.add(" ".join(f"w{token}" for token in tokens), token_ids=tokens)
        writer.finish()
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"""
name: quick
run_dir: {folder / "run"}
model: {{source: {folder / "random"}}}
data: {{corpus: {folder / "corpus"}, sequence_length: 32}}
mixture: {{update: constant, initial_weights: uniform}}
pretrain: {{duration: {steps} steps, batch_size: 16, micro_batch_size: 16, learning_rate: 3e-3}}
evaluation: {{tokens_per_domain: 512, outside: {folder / "outside"}}}
""")
    pretrain(RunContext(load_recipe(recipe), console=Console(quiet=True)))
    trained = recipe.read_text().replace(str(folder / "random"), str(folder / "run" / "model"))
    recipe.write_text(
        trained
        + """
target: {num_hidden_layers: 2, hidden_size: 36, intermediate_size: 48, num_attention_heads: 3}
prune: {duration: 10 steps, batch_size: 8, micro_batch_size: 8, learning_rate: 1e-3, mask_learning_rate: 0.1,
  sparsity_warmup: 0 steps, freeze: 50%, calibration_tokens: 2048}
"""
    )
    return recipe


def _benches(arguments: argparse.Namespace, *, recipe: Path, output: Path, console: Console) -> Iterator[Bench]:
    for seed in arguments.seeds:
        common = ["mixture.update=constant", "mixture.initial_weights=uniform", f"seed={seed}"]
        common += ["prune.validation_interval=null", "pretrain.validation_interval=null"]  # steps are timed
        loaded = load_recipe(recipe, overrides=[*arguments.overrides, *common])
        settings = {name: value for name, value in of_recipe(loaded).items() if name != "seed"}
        require_settings(output, settings | {"warmup": arguments.warmup})
        for steps in arguments.steps:
            yield Bench(
                loaded,
                folder=output / f"seed-{seed}",
                steps=steps,
                warmup=arguments.warmup,
                console=console,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model that was trained to count")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, nargs="+", help="lengths to train for; the demo's step is of 1,024 tokens")
    parser.add_argument("--warmup", type=int, default=8, help="steps")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--equal", nargs="+", choices=EQUAL, default=list(EQUAL))
    parser.add_argument("--output", type=Path, default=Path("runs/distillation"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    console = Console() if sys.stdout.isatty() else Console(width=170)
    rows = list(dict.fromkeys([CE, *arguments.rows]))
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.quick:
            arguments.steps = arguments.steps or [40]
            recipe, output, shown = quick_inputs(Path(temporary)), Path(temporary) / "rows", Console(quiet=True)
        else:
            arguments.steps = arguments.steps or [30, 190]
            recipe, output, shown = arguments.recipe, arguments.output, console
        found: dict[int, Results] = {}
        ratios: dict[str, float] = {}
        for bench in _benches(arguments, recipe=recipe, output=output, console=shown):
            ratios = {row: bench.flops_ratio(row) for row in rows}
            of_length = found.setdefault(bench.steps, {})
            for row in rows:
                for equal in ("tokens",) if row in (CE, CACHED) else arguments.equal:
                    of_length.setdefault((row, equal), {})[bench.seed] = bench.run(row, equal=equal)
    figures = {}
    for steps, results in found.items():
        figures[f"{steps} steps"] = summarise(results, ratios=ratios)
        print_table(figures[f"{steps} steps"], console=console)
        if not arguments.quick:
            write_text(output / f"{steps} steps.md", markdown_of(figures[f"{steps} steps"]))
    last = figures[f"{arguments.steps[-1]} steps"]
    record = {name: value for name, value in last.items() if name != "rows"}
    record |= {"lengths": figures, "flops_ratios": ratios, "seeds": arguments.seeds}
    print(json.dumps({"benchmark": "distillation", **record, "versions": environment(resolve_device("auto"))}))


if __name__ == "__main__":
    main()
