"""Training a 2:4 model on: which of its weights, by which method, at equal tokens and at equal FLOPs.

Every row begins at the same one-shot masks of a draw and sees the same text. `masked` trains all kept weights; `lora`,
`lora of all` (every linear layer, about as many parameters as `spp`), `spp` and `speft` few parameters; `ast` all
weights, under masks that are chosen anew. `+ teacher` minimises AST's published loss, a third cross-entropy and two
thirds divergence from the dense model at temperature 2, which reads along. Budgets are steps of `masked`; at equal
FLOPs a method takes as many steps as its cost allows, what SPEFT's choice and AST's norms cost once included. The
learning rate of a method is the one of `--rates`, times its own, of least validation loss in the first draw of the
smallest budget.

Rows are files in the output folder: an interrupted benchmark goes on where it was, inside of a row too. Seconds are
those of all steps, by the run's own record.

    python benchmarks/sparse_training.py [--quick] [--methods masked lora …] [--budgets 32 128] [--seeds 3]
        [--rates 0.3 1 3] [--model runs/demo-data/model] [--corpus runs/demo-data/corpus]
        [--outside runs/demo-data/outside] [--output runs/sparse-training] [--minutes 60]

The last line is JSON. `rows`: of each budget, measure and method mean test loss, of the corpus and of other domains,
over draws. `over_masked`: paired differences to `masked` without a teacher, in nats. `best`: by validation text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from distillation import quick_inputs
from kept import require_settings
from rich.console import Console

from shearing.data.corpus.corpus import Corpus
from shearing.evaluation.environment import environment
from shearing.evaluation.heldout import heldout_loss
from shearing.files.durable import read_json, write_json, write_text
from shearing.files.tensors import read_header
from shearing.models.loading import load_config, load_source
from shearing.models.shape import Shape
from shearing.pruning.sparse.stored.check import differences
from shearing.runs.race.results.summary import paired
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.run import run as run_stages

TEACHER = {"weight": 0.67, "temperature": 2.0, "domains": "all"}
ONE_SHOT = "one-shot"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        pretrain: its section of `pretrain`.
        rate: learning rate that `--rates` multiply.
        gradients: linear layers whose weights have gradients; None: all, and the head.
        teacher: whether the dense model is listened to.
        learned_from, read: sequences that go forward and backward, or forward alone, once.
    """

    pretrain: Mapping[str, Any]
    rate: float
    gradients: Sequence[str] | None = None
    teacher: bool = False
    learned_from: int = 0
    read: int = 0

    def cost(self, shape: Shape) -> float:
        """FLOPs of a token over those of `masked`: forward, backward, weight gradients, and the teacher's forward."""
        return (2 + _share(shape, self.gradients) + self.teacher) / 3

    def steps(self, budget: int, *, shape: Shape, batch: int) -> int:
        """That cost as much as `budget` steps of `masked`, with what is read once.

        Args:
            budget: steps.
            shape: of the model.
            batch: sequences of a step.
        """
        once = (self.learned_from + self.read / 3) / batch
        return max(1, round((budget - once) / self.cost(shape)))


def _share(shape: Shape, linear: Sequence[str] | None) -> float:
    """Of all products with weights, those with the weights of some linear layers of each layer."""
    if linear is None:
        return 1.0
    width, queries = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    outside = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
    sizes = {name: width * outside.get(name, shape.intermediate_size) for name in LINEAR}
    whole = shape.num_hidden_layers * sum(sizes.values()) + shape.vocab_size * width
    return shape.num_hidden_layers * sum(sizes[name] for name in linear) / whole


# What is dropped shrinks as fast as a short stage wants it, where the published 6e-5 a step would do nothing.
AST = {"interval": "5%", "scores": "wanda", "samples": 16, "decay": 0.02, "ramp": "25%", "freeze": "20%"}
METHODS: dict[str, Method] = {
    "masked": Method({}, rate=3e-4),
    "masked + teacher": Method({}, rate=3e-4, teacher=True),
    "lora": Method({"lora": {"rank": 16, "alpha": 32.0}}, rate=1e-3, gradients=["q_proj", "v_proj"]),
    "lora of all": Method({"lora": {"rank": 8, "alpha": 16.0, "targets": LINEAR}}, rate=1e-3, gradients=LINEAR),
    "spp": Method({"spp": {"rank": 16}}, rate=4e-3, gradients=LINEAR),
    "speft": Method({"speft": {"share": 0.01, "samples": 32}}, rate=1e-3, gradients=LINEAR, learned_from=32),
    "ast": Method({"ast": AST}, rate=3e-4, read=16),
    "ast + teacher": Method({"ast": AST}, rate=3e-4, teacher=True, read=16),
}


@dataclass(frozen=True)
class Sizes:
    """How much is read and trained.

    Attributes:
        seqlen: tokens of a sequence.
        batch: sequences of a step.
        samples: calibration text.
        heldout: tokens per domain and split.
    """

    seqlen: int
    batch: int
    samples: int
    heldout: int


FULL = Sizes(seqlen=256, batch=4, samples=32, heldout=1024)
QUICK = Sizes(seqlen=32, batch=8, samples=8, heldout=512)


@dataclass(frozen=True)
class Row:
    """A trained model.

    Attributes:
        method: a name in `METHODS`, or `ONE_SHOT`: not trained.
        steps: that it takes.
        rate: its learning rate.
        seed: draws calibration and training text.
    """

    method: str
    steps: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.method.replace(' ', '')}-{self.steps}-{self.rate:g}-{self.seed}"


class Bench:
    """Rows of one model, from their files where they are there.

    Args:
        arguments: of the command line.
        sizes: of texts.
        console: where progress goes.
    """

    def __init__(self, arguments: argparse.Namespace, *, sizes: Sizes, console: Console) -> None:
        self.arguments, self.sizes, self.console = arguments, sizes, console
        self.output: Path = arguments.output
        self.corpora: dict[str, Path] = {"inside": arguments.corpus}
        if arguments.outside.is_dir():
            self.corpora["outside"] = arguments.outside
        self.ends = time.monotonic() + 60 * arguments.minutes
        settings = {**asdict(sizes), "criterion": arguments.criterion, "model": arguments.model}
        require_settings(self.output, settings | {"corpora": self.corpora})
        self.shape = Shape.of(load_config(str(arguments.model)))

    def row(self, row: Row) -> dict[str, Any]:
        """Losses by domain, seconds and trained parameters."""
        path = self.output / "rows" / f"{row.name}.json"
        if not path.is_file():
            if time.monotonic() > self.ends:
                raise SystemExit(f"out of time: the same command goes on from {self.output}")
            path.parent.mkdir(exist_ok=True)
            measured = self._measured(row)
            write_json(path, {**asdict(row), **measured})
            said = f"validation {_mean(measured['validation']):.4f}, {measured['seconds']:.0f} s"
            self.console.print(f"{row.name}: {said}", soft_wrap=True)
        return read_json(path)

    def _measured(self, row: Row) -> dict[str, Any]:
        sparse = self._sparse(row.seed)
        if row.method == ONE_SHOT:
            return {"seconds": 0.0, "trained": 0, **self._losses(sparse.sparse)}
        directory = RunDirectory(self.output / "runs" / row.name)
        if not directory.is_complete("sparsify"):
            shutil.rmtree(directory.path, ignore_errors=True)
            shutil.copytree(sparse.sparsify, directory.sparsify)
        run_stages(self.recipe(row, folder=directory.path), stages=["pretrain"], console=Console(quiet=True))
        lines = map(json.loads, directory.metrics("pretrain").read_text(encoding="utf-8").splitlines())
        seconds = sum(line["seconds"] for line in lines if "event" not in line)
        assert differences(directory.model) == []
        measured = {"seconds": seconds, "trained": _trained(directory), **self._losses(directory.model)}
        shutil.rmtree(directory.path)
        return measured

    def _sparse(self, seed: int) -> RunDirectory:
        """The one-shot model of a draw."""
        directory = RunDirectory(self.output / "sparse" / str(seed))
        if not directory.is_complete("sparsify"):
            recipe = self.recipe(Row("masked", 1, 1e-4, seed), folder=directory.path)
            run_stages(recipe, stages=["sparsify"], console=Console(quiet=True))
        return directory

    def recipe(self, row: Row, *, folder: Path) -> Recipe:
        """The run of a row."""
        sizes, method = self.sizes, METHODS[row.method]
        return Recipe.model_validate(
            {
                "name": row.name,
                "run_dir": str(folder),
                "seed": row.seed,
                "model": {"source": str(self.arguments.model)},
                "data": {"corpus": str(self.arguments.corpus), "sequence_length": sizes.seqlen},
                "mixture": {"initial_weights": "uniform", "update": "constant"},
                "sparsify": {
                    "criterion": self.arguments.criterion,
                    "pattern": "2:4",
                    "samples": sizes.samples,
                    "seqlen": sizes.seqlen,
                },
                "pretrain": {
                    "duration": f"{row.steps} steps",
                    "batch_size": f"{sizes.batch} sequences",
                    "micro_batch_size": min(4, sizes.batch),
                    "learning_rate": row.rate,
                    "warmup": "10%",
                    "validation_interval": None,
                    "checkpoint_interval": "50%",
                    "keep_last": 1,
                    **method.pretrain,
                },
                "training": {"log_interval": 1},
                "distill": TEACHER if method.teacher else None,
            }
        )

    def rates(self) -> dict[str, float]:
        """Of each method, the rate of least validation loss in the first draw of the smallest budget."""
        steps, found = min(self.arguments.budgets), {}
        for name in self.arguments.methods:
            tried = [factor * METHODS[name].rate for factor in self.arguments.rates]
            losses = {rate: _mean(self.row(Row(name, steps, rate, 0))["validation"]) for rate in tried}
            found[name] = min(losses, key=lambda rate: losses[rate])
        return found

    def _losses(self, folder: Path) -> dict[str, Any]:
        """Held-out losses by domain: validation and test text of the corpus, test text of the other."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_source(str(folder), device=device, dtype=torch.float32)

        def of(name: str, *, split: Any) -> dict[str, float]:
            found = heldout_loss(
                model,
                Corpus.open(self.corpora[name]),
                split=split,
                tokens_per_domain=self.sizes.heldout,
                sequence_length=self.sizes.seqlen,
                micro_batch_size=4,
            )
            return {domain: loss.loss for domain, loss in found.items()}

        return {
            "validation": of("inside", split="validation"),
            "losses": of("inside", split="test"),
            "outside": of("outside", split="test") if "outside" in self.corpora else {},
        }


def _trained(directory: RunDirectory) -> int:
    """Parameters that AdamW has moments of, in the last checkpoint."""
    shards = sorted(directory.checkpoints("pretrain").glob("step-*/shard-*.safetensors"))
    held = [entry for shard in shards for entry in read_header(shard)[0].items()]
    return sum(entry.shape[0] for name, entry in held if name.startswith("exp_avg/"))


def _mean(losses: Mapping[str, float]) -> float:
    return statistics.mean(losses.values())


def steps_of(bench: Bench, method: str, *, budget: int, measure: str) -> int:
    """Steps that a method takes for the tokens, or for the FLOPs, of `budget` steps of `masked`."""
    return budget if measure == "tokens" else METHODS[method].steps(budget, shape=bench.shape, batch=bench.sizes.batch)


def summary(bench: Bench, *, rates: Mapping[str, float]) -> dict[str, Any]:
    """All rows, and the figures of the last line."""
    arguments = bench.arguments
    seeds = range(arguments.seeds)
    start = {seed: bench.row(Row(ONE_SHOT, 0, 0.0, seed)) for seed in seeds}
    tables: dict[str, dict[str, Any]] = {}
    over: dict[str, dict[str, Any]] = {}
    for budget in arguments.budgets:
        for measure in ("tokens", "flops"):
            rows = {
                name: {
                    seed: bench.row(Row(name, steps_of(bench, name, budget=budget, measure=measure), rates[name], seed))
                    for seed in seeds
                }
                for name in arguments.methods
            }
            key = f"{budget} steps, equal {measure}"
            tables[key] = {name: _line(of_seeds) for name, of_seeds in {ONE_SHOT: start, **rows}.items()}
            masked = {seed: _mean(row["losses"]) for seed, row in rows.get("masked", {}).items()}
            over[key] = {
                name: paired({seed: _mean(row["losses"]) for seed, row in of_seeds.items()}, masked)
                for name, of_seeds in rows.items()
                if name != "masked"
            }
    best = {key: min(lines, key=lambda name: lines[name]["validation"]) for key, lines in tables.items()}
    return {"rates": dict(rates), "rows": tables, "over_masked": over, "best": best}


def _line(of_seeds: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    rows = list(of_seeds.values())
    return {
        "steps": rows[0]["steps"],
        "trained": rows[0]["trained"],
        "seconds": round(statistics.mean(row["seconds"] for row in rows), 1),
        "validation": round(statistics.mean(_mean(row["validation"]) for row in rows), 4),
        "test": round(statistics.mean(_mean(row["losses"]) for row in rows), 4),
        "outside": round(statistics.mean(_mean(row["outside"]) for row in rows), 4) if rows[0]["outside"] else None,
    }


def markdown_of(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """One table for each budget and measure."""
    parts = []
    for key, lines in tables.items():
        table = [[key, "steps", "trained", "test", "other domains", "seconds"], ["---", *["---:"] * 5]]
        for name, line in lines.items():
            outside = "–" if line["outside"] is None else f"{line['outside']:.3f}"
            cells = [f"{line['steps']}", f"{line['trained']:,}", f"{line['test']:.3f}", outside]
            table.append([name, *cells, f"{line['seconds']:,.0f}"])
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in table))
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model that was trained to count")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), help="unset: all")
    parser.add_argument("--budgets", nargs="+", type=int, help="steps of masked training; unset: 32 and 128")
    parser.add_argument("--seeds", type=int, help="draws; unset: 3")
    parser.add_argument("--rates", nargs="+", type=float, help="factors of each method's rate; unset: 0.3, 1 and 3")
    parser.add_argument("--criterion", default="wanda", help="of the one-shot masks")
    parser.add_argument("--model", type=Path, default=Path("runs/demo-data/model"))
    parser.add_argument("--corpus", type=Path, default=Path("runs/demo-data/corpus"))
    parser.add_argument("--outside", type=Path, default=Path("runs/demo-data/outside"))
    parser.add_argument("--output", type=Path, default=Path("runs/sparse-training"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no further row is begun")
    chosen = parser.parse_args(arguments)
    chosen.methods = chosen.methods or list(METHODS)
    chosen.budgets = chosen.budgets or ([8] if chosen.quick else [32, 128])
    chosen.seeds = chosen.seeds or (1 if chosen.quick else 3)
    chosen.rates = chosen.rates or ([1.0] if chosen.quick else [0.3, 1.0, 3.0])
    transformers.utils.logging.disable_progress_bar()
    console = Console() if sys.stdout.isatty() else Console(width=150)
    with tempfile.TemporaryDirectory() as temporary:
        if chosen.quick:
            folder = Path(temporary)
            quick_inputs(folder, steps=150)
            chosen.model, chosen.output = folder / "run" / "model", folder / "rows"
            chosen.corpus, chosen.outside = folder / "corpus", folder / "outside"
        elif not (chosen.model / "config.json").is_file():
            raise SystemExit(f"no model in {chosen.model}: python -m data_tools.demo --output runs/demo-data")
        sizes = QUICK if chosen.quick else FULL
        bench = Bench(chosen, sizes=sizes, console=console)
        result = summary(bench, rates=bench.rates())
        table = markdown_of(result["rows"])
        write_text(bench.output / "table.md", table)
        console.print(table, soft_wrap=True)
        parameters = Shape.of(load_config(str(chosen.model))).num_parameters()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        json.dumps(
            {
                "benchmark": "sparse_training",
                "quick": chosen.quick,
                "parameters": parameters,
                **asdict(sizes),
                "budgets": chosen.budgets,
                "seeds": chosen.seeds,
                **result,
                **environment(device),
            }
        )
    )


if __name__ == "__main__":
    main()
