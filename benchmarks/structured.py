"""The one race: every way to choose what goes, at equal shape, tokens, samples and learning rates (`shear compare`).

In full, three budgets of one recipe: all methods with and without the refit at the first, the best eight with it at the
second, the best three and `start` at the third; who is best is read from the rows before. `learned` and `start` run at
every budget. Rows are kept in the output folder, so an interrupted race goes on where it was.

    python benchmarks/structured.py [--quick] [--recipe recipes/race-135m.yaml] [--output runs/structured] [key=value …]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.data.corpus.writer import CorpusWriter
from shearing.files.durable import write_json, write_text
from shearing.runs.race.methods import LEARNED, METHODS, START
from shearing.runs.race.race import compare
from shearing.runs.race.results.tables import markdown_tables
from shearing.runs.race.rows import Equal, RaceSettings, Refit
from shearing.runs.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Heat:
    """One budget.

    Attributes:
        tokens: of every row at equal tokens.
        seeds: how many.
        best: how many methods go on from the heat before; None: all there are.
        refit: forms of them.
    """

    tokens: int
    seeds: int
    best: int | None
    refit: Refit


HEATS = (
    Heat(31_000, seeds=3, best=None, refit="both"),
    Heat(195_000, seeds=3, best=8, refit="with"),
    Heat(1_000_000, seeds=2, best=3, refit="with"),
)
QUICK = (Heat(8_192, seeds=1, best=None, refit="with"), Heat(8_192, seeds=2, best=1, refit="with"))


def run_heats(
    recipe: Recipe, *, heats: Sequence[Heat], methods: Sequence[str], equal: tuple[Equal, ...], output: Path
) -> list[dict[str, Any]]:
    """Results of each budget, one after the other."""
    console = Console() if sys.stdout.isatty() else Console(width=150)
    results: list[dict[str, Any]] = []
    for heat in heats:
        chosen = list(methods)
        if heat.best is not None and results:
            chosen = [*best_of(results[-1], count=heat.best), START, LEARNED]
        settings = RaceSettings(
            recipe=recipe,
            output=output,
            tokens=(heat.tokens,),
            methods=tuple(name for name in methods if name in chosen),
            seeds=tuple(range(heat.seeds)),
            refit=heat.refit,
            equal=equal,
        )
        console.rule(f"[bold]{heat.tokens:,} tokens[/]: {', '.join(settings.methods)}")
        results.append(compare(settings, console=console))
        write_json(output / "structured.json", {"heats": results})
        write_text(output / "structured.md", "\n".join(map(markdown_tables, results)))
    return results


def best_of(results: dict[str, Any], *, count: int) -> list[str]:
    """The methods of least validation loss at equal tokens, in whichever form, beside `start` and `learned`.

    Raises:
        SystemExit: a row was measured before races measured validation text: test text judges, and must not choose.
    """
    rows = results["budgets"][0].get("equal_tokens") or results["budgets"][0]["equal_flops"]
    finished = [row for row in rows["rows"] if row["seeds"] and not row["failed"]]
    if unmeasured := [row["name"] for row in finished if row["validation"] is None]:
        raise SystemExit(f"no validation losses of {', '.join(unmeasured)}: remove these rows, and run them again")
    ended = sorted((row["validation"], row["method"]) for row in finished)
    best = dict.fromkeys(method for _, method in ended if method not in (START, LEARNED))
    return list(best)[:count]


def line_of(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each budget says of learning."""
    differences = ("learned_minus_start", "learned_minus_best_rival")
    said = (*differences, *(f"{name}_outside" for name in differences), "best_rival", "changed_from_start")
    return [
        {
            "tokens": budget["tokens"],
            **{
                table: {name: budget[table].get(name) for name in said}
                for table in ("equal_tokens", "equal_flops")
                if table in budget
            },
            "failed": sorted(
                {
                    row["name"]
                    for table in ("equal_tokens", "equal_flops")
                    for row in budget.get(table, {"rows": ()})["rows"]
                    if row["failed"]
                }
            ),
        }
        for heat in results
        for budget in heat["budgets"]
    ]


def quick_inputs(folder: Path) -> Path:
    """A tiny model that has learned to count, two domains of counting up and down, and a recipe over them."""
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
    model = AutoModelForCausalLM.from_config(config)
    _teach_counting(model)
    model.save_pretrained(folder / "model")
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
prune: {{duration: 20 steps, batch_size: 8, micro_batch_size: 8, learning_rate: 1e-3, calibration_tokens: 1024}}
pretrain: {{duration: 20 steps, batch_size: 8, micro_batch_size: 8, learning_rate: 1e-3, optimizer: fresh}}
evaluation: {{tokens_per_domain: 512}}
""")
    return recipe


def _teach_counting(model: PreTrainedModel) -> None:
    """Train a model until it counts up and down: what is random has no units worth choosing."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        first_B1 = torch.randint(127, (16, 1), generator=generator)
        stride_B1 = torch.where(torch.rand(16, 1, generator=generator) < 0.5, 1, 126)
        tokens_BT = (first_B1 + stride_B1 * torch.arange(32)) % 127 + 1
        model(tokens_BT, labels=tokens_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model that counts, one budget; two seeds of the best"
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/race-135m.yaml"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--equal", nargs="+", choices=["tokens", "flops"], default=None)
    parser.add_argument("--output", type=Path, default=Path("runs/structured"))
    parser.add_argument("--heats", type=int, default=len(HEATS), help="how many of the budgets, from the smallest")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        path, output, heats = arguments.recipe, arguments.output, HEATS[: arguments.heats]
        if arguments.quick:
            path, output, heats = quick_inputs(Path(temporary)), Path(temporary) / "race", QUICK
        equal = tuple(arguments.equal or (["tokens"] if arguments.quick else ["tokens", "flops"]))
        results = run_heats(
            load_recipe(path, overrides=arguments.overrides),
            heats=heats,
            methods=arguments.methods,
            equal=equal,
            output=output,
        )
    line = {
        "benchmark": "structured",
        "quick": arguments.quick,
        "budgets": line_of(results),
        **results[-1]["environment"],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
