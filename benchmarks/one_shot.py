"""One-shot sparsity of a real model: every criterion with every reconstruction, and which published orderings hold.

Three parts, whose rows are files in the output folder: an interrupted benchmark goes on where it was. A row that was
interrupted begins anew, or its seconds and memory would be of its last piece.

grid          criterion x reconstruction at 50 % and 2:4 (N kept of M), one draw of the calibration text
finals        the best five of validation text and all that published orderings name, at 50 %, 60 %, 2:4 and 4:8, with
              three draws
allocations   Wanda at 62.5 % with levels N:8, shared out by every rule and by the search

Validation text of the corpus chooses; test text of it, and of a corpus of other domains, judges. Each model is made in
a process of its own, whose peak memory is reported. `--peers` also measures memory by depth, and time beside
llm-compressor's where that is installed (`make compare-llmcompressor` makes such an environment).

    python benchmarks/one_shot.py [--quick] [--parts grid finals allocations] [--peers] [--model runs/demo-data/model]
        [--corpus runs/demo-data/corpus] [--outside runs/demo-data/outside] [--output runs/one-shot]

The last line is JSON. `best`: by pattern, of validation text. `orderings`: whether each held, by how much; `undecided`
within twice the standard error over draws and domains.
`msp_over_best_rival`: test loss of the search over that of the best rule, None without the part.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from distillation import quick_inputs
from kept import require_settings
from one_shot_rows import (
    DENSE,
    ORDERINGS,
    PATTERNS,
    SHARED_OUT,
    SPARSEGPT,
    WANDA,
    Cell,
    best_of,
    markdown_of,
    mean_of,
    orderings,
    shared_out,
)
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from shearing.data.corpus.corpus import Corpus
from shearing.evaluation.environment import environment
from shearing.evaluation.heldout import heldout_loss
from shearing.files.durable import read_json, write_json, write_text
from shearing.models.loading import load_source
from shearing.progress import max_memory
from shearing.pruning.calibration.text import load_calibration
from shearing.pruning.sparse.allocation.facts import ALLOCATIONS
from shearing.pruning.sparse.criteria.facts import CRITERIA
from shearing.pruning.sparse.one_shot import sparsify
from shearing.pruning.sparse.recipe import SparsifyRecipe
from shearing.pruning.sparse.reconstruction.facts import RECONSTRUCTIONS
from shearing.pruning.sparse.stored.check import differences
from shearing.pruning.sparse.stored.manifest import read_manifest

# The server imports everything once; each measurement is a fork of it that has computed nothing yet.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["shearing.pruning.sparse.one_shot", "shearing.evaluation.heldout", "transformers"])


@dataclass(frozen=True)
class Sizes:
    """How much is read, and of what.

    Attributes:
        samples, seqlen: calibration text.
        heldout: tokens per domain and split.
        grid, finals: patterns of either part.
        seeds: of the finals.
        best: how many of the grid go on.
        search: keys of the search.
    """

    samples: int
    seqlen: int
    heldout: int
    grid: tuple[str, ...] = ("50%", "2:4")
    finals: tuple[str, ...] = ("50%", "60%", "2:4", "4:8")
    seeds: int = 3
    best: int = 5
    search: dict[str, int] = field(default_factory=dict)


FULL = Sizes(
    samples=32,
    seqlen=256,
    heldout=1024,
    search={"population": 12, "offspring": 16, "generations": 8, "fitness_samples": 8},
)
QUICK = Sizes(
    samples=8,
    seqlen=32,
    heldout=512,
    grid=("2:4",),
    finals=("60%",),
    seeds=1,
    best=1,
    search={"population": 4, "offspring": 4, "generations": 2, "fitness_samples": 4},
)


class Bench:
    """Rows of one model, from their files where they are there.

    Args:
        arguments: of the command line.
        sizes: of texts.
        console: where progress goes.
    """

    def __init__(self, arguments: argparse.Namespace, *, sizes: Sizes, console: Console) -> None:
        self.model, self.output, self.sizes, self.console = arguments.model, arguments.output, sizes, console
        self.corpora: dict[str, Path] = {"inside": arguments.corpus}
        if arguments.outside.is_dir():
            self.corpora["outside"] = arguments.outside
        self.ends = time.monotonic() + 60 * arguments.minutes
        self.output.mkdir(parents=True, exist_ok=True)
        corpora = {name: str(folder) for name, folder in self.corpora.items()}
        require_settings(self.output, asdict(sizes) | {"model": str(self.model), "corpora": corpora})

    def row(self, cell: Cell) -> dict[str, Any]:
        """Losses by domain, seconds and memory."""
        path = (
            self.output
            / cell.pattern.replace(" ", "-").replace(":", "-of-")
            / f"{cell.method.replace(' ', '')}-{cell.seed}.json"
        )
        if not path.is_file():
            if time.monotonic() > self.ends:
                raise SystemExit(f"out of time: the same command goes on from {self.output}")
            path.parent.mkdir(exist_ok=True)
            shutil.rmtree(self.output / "sparse", ignore_errors=True)
            row = _in_process(measure, self.recipe_of(cell), cell, self.model, self.corpora, self.sizes)
            write_json(path, {**asdict(cell), **row})
            said = f"validation {mean_of(row['validation']):.4f}, {row.get('seconds', 0.0):.1f} s"
            self.console.print(f"{cell.method} {cell.pattern}, draw {cell.seed}: {said}", soft_wrap=True)
        return read_json(path)

    def recipe_of(self, cell: Cell) -> dict[str, Any]:
        """What `shear sparsify` is told."""
        return {
            "model": str(self.model),
            "output": str(self.output / "sparse" / f"{cell.pattern}-{cell.method}-{cell.seed}".replace(" ", "")),
            "criterion": cell.criterion,
            "reconstruction": cell.reconstruction,
            "allocation": cell.allocation,
            "calibration": [str(self.corpora["inside"])],
            "samples": self.sizes.samples,
            "seqlen": self.sizes.seqlen,
            "seed": cell.seed,
            **PATTERNS[cell.pattern],
            **({"search": self.sizes.search} if cell.allocation == "msp" else {}),
        }

    def grid(self) -> dict[Cell, dict[str, Any]]:
        """Every criterion with every reconstruction; what orderings name comes first."""
        named = [pair for ordering in ORDERINGS for pair in (ordering.better, ordering.worse)]
        pairs = dict.fromkeys([*named, *((c, r) for r in RECONSTRUCTIONS for c in CRITERIA)])
        return self._rows(Cell(*pair, pattern) for pair in pairs for pattern in self.sizes.grid)

    def finals(self, grid: Mapping[Cell, Mapping[str, Any]]) -> dict[Cell, dict[str, Any]]:
        """The best of the grid, and both sides of every ordering at its patterns."""
        cells = [
            Cell(*pair, pattern, seed)
            for seed in range(self.sizes.seeds)
            for ordering in ORDERINGS
            for pattern in ordering.patterns
            if pattern in self.sizes.finals
            for pair in (ordering.better, ordering.worse)
        ]
        for of_grid in self.sizes.grid:
            ranked = sorted((c for c in grid if c.pattern == of_grid), key=lambda c: mean_of(grid[c]["validation"]))
            for best in ranked[: self.sizes.best]:
                cells += [
                    Cell(best.criterion, best.reconstruction, pattern, seed)
                    for seed in range(self.sizes.seeds)
                    for pattern in self.sizes.finals
                ]
        return self._rows(dict.fromkeys(cells))

    def allocations(self) -> dict[Cell, dict[str, Any]]:
        """Wanda with every way to share its budget out."""
        return self._rows(
            Cell(*WANDA, SHARED_OUT, seed, name) for seed in range(self.sizes.seeds) for name in ALLOCATIONS
        )

    def _rows(self, cells: Iterable[Cell]) -> dict[Cell, dict[str, Any]]:
        return {cell: self.row(cell) for cell in cells}


def measure(
    recipe: dict[str, Any], cell: Cell, model: Path, corpora: Mapping[str, Path], sizes: Sizes
) -> dict[str, Any]:
    """Makes a sparse model and measures it."""
    if cell.criterion == DENSE:
        return _losses(model, corpora, sizes)
    prepared = SparsifyRecipe.model_validate(recipe)
    row = prune(prepared)
    assert differences(prepared.output) == []
    row |= _losses(prepared.output, corpora, sizes)
    shutil.rmtree(prepared.output)
    return row


def prune(recipe: SparsifyRecipe) -> dict[str, Any]:
    """Seconds and memory of one run, in bytes above what importing took."""
    watch = _Watch()
    started = time.perf_counter()
    sparsify(recipe, console=Console(quiet=True))
    seconds = time.perf_counter() - started
    manifest = read_manifest(recipe.output)
    return {
        "seconds": seconds,
        "metric_seconds": manifest["seconds"]["metric"],
        "forward_seconds": manifest["seconds"]["forward"],
        "sparsity": manifest["budget"]["reached"]["sparsity"],
        "peak_memory": max_memory(),
        "peak_memory_above_start": max_memory() if torch.cuda.is_available() else watch.peak(),
    }


def _losses(folder: Path, corpora: Mapping[str, Path], sizes: Sizes) -> dict[str, Any]:
    """Held-out losses by domain: validation and test text of the corpus, test text of the other."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_source(str(folder), device=device)

    def of(name: str, *, split: Any) -> dict[str, float]:
        found = heldout_loss(
            model,
            Corpus.open(corpora[name]),
            split=split,
            tokens_per_domain=sizes.heldout,
            sequence_length=sizes.seqlen,
            micro_batch_size=4,
        )
        return {domain: loss.loss for domain, loss in found.items()}

    return {
        "validation": of("inside", split="validation"),
        "losses": of("inside", split="test"),
        "outside": of("outside", split="test") if "outside" in corpora else {},
    }


def memory_by_depth(bench: Bench) -> dict[str, Any]:
    """Peak memory of wanda and sparsegpt at 2:4 on a third of the layers and on all."""
    layers: int = read_json(bench.model / "config.json")["num_hidden_layers"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        short = _cut_to(bench.model, Path(temporary) / "short", layers=layers // 3)
        for depth, model in ((layers // 3, short), (layers, bench.model)):
            for criterion, way in (WANDA, SPARSEGPT):
                recipe = bench.recipe_of(Cell(criterion, way, "2:4"))
                recipe |= {"model": str(model), "output": f"{temporary}/{criterion}-{depth}"}
                row = _in_process(prune, SparsifyRecipe.model_validate(recipe))
                found.setdefault(criterion, {})[depth] = row["peak_memory_above_start"]
    return found


def _cut_to(model: Path, output: Path, *, layers: int) -> Path:
    """The first layers of a model, as a model."""
    short = AutoModelForCausalLM.from_pretrained(model)
    del short.model.layers[layers:]
    short.config.num_hidden_layers = layers
    if getattr(short.config, "layer_types", None):
        short.config.layer_types = short.config.layer_types[:layers]
    short.save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)
    return output


def against_llmcompressor(bench: Bench, rows: Mapping[Cell, Mapping[str, Any]]) -> dict[str, Any]:
    """Our time over its time at 2:4, the larger of wanda's and sparsegpt's; None where it is not installed."""
    if importlib.util.find_spec("llmcompressor") is None:
        return {"time_ratio_to_llmcompressor": None}
    theirs = {
        pair: _in_process(prune_with_llmcompressor, bench.model, bench.corpora["inside"], bench.sizes, pair[0])
        for pair in (WANDA, SPARSEGPT)
    }
    ratios = {pair[0]: rows[Cell(*pair, "2:4")]["seconds"] / of["seconds"] for pair, of in theirs.items()}
    found = {pair[0]: of for pair, of in theirs.items()}
    return {"time_ratio_to_llmcompressor": round(max(ratios.values()), 3), "llmcompressor": found, "ratios": ratios}


def prune_with_llmcompressor(model: Path, corpus: Path, sizes: Sizes, criterion: str) -> dict[str, Any]:
    """The same rows, at 2:4, with llm-compressor (its N:M counts what is pruned, which is the same here).

    From the dense model's files to the sparse model's, as ours is, which writes masks, checksums and a manifest too.
    """
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
    from torch.utils.data import DataLoader

    started = time.perf_counter()
    calibration = load_calibration(
        [corpus],
        tokenizer=AutoTokenizer.from_pretrained(model),
        vocab_size=1 << 31,
        samples=sizes.samples,
        seqlen=sizes.seqlen,
        seed=0,
    )
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in calibration.tokens]
    kind = WandaPruningModifier if criterion == "wanda" else SparseGPTModifier
    loaded = time.perf_counter()
    oneshot(
        model=dense,
        processor=object(),
        dataset=DataLoader(rows, batch_size=1),
        recipe=kind(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"]),
        max_seq_length=sizes.seqlen,
        num_calibration_samples=sizes.samples,
        shuffle_calibration_samples=False,
    )
    pruned = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(folder)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "pruning_seconds": pruned - loaded, "peak_memory": max_memory()}


class _Watch:
    """The highest resident memory of this process from now on, above what it is now."""

    def __init__(self) -> None:
        self._start = self._highest = _resident()
        threading.Thread(target=self._look, daemon=True).start()

    def peak(self) -> int:
        return self._highest - self._start

    def _look(self) -> None:
        while True:
            self._highest = max(self._highest, _resident())
            time.sleep(0.005)


def _resident() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _in_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result: dict[str, Any] = receiver.recv()
    finally:
        process.join()
    return result


def _send(sender: Connection, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    transformers.utils.logging.disable_progress_bar()
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    sender.send(function(*arguments))
    sender.close()


def _leave_with(parent: int) -> None:
    """A row nobody waits for any more would go on, and stand in the way of the one that continues it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def run(arguments: argparse.Namespace, *, sizes: Sizes, console: Console) -> dict[str, Any]:
    """All parts that are asked for, their tables, and the figures of the last line."""
    bench = Bench(arguments, sizes=sizes, console=console)
    dense = bench.row(Cell(DENSE, "none", "50%"))
    grid = bench.grid()
    rows = dict(grid)
    if "finals" in arguments.parts:
        rows |= bench.finals(grid)
    for pattern in sizes.grid:
        table = markdown_of(grid, pattern=pattern)
        write_text(bench.output / f"{pattern}.md", table)
        console.print(table, soft_wrap=True)
    result: dict[str, Any] = {
        "dense": {kind: round(mean_of(dense[kind]), 4) for kind in ("validation", "losses", "outside") if dense[kind]},
        "best": best_of(rows),
        "orderings": orderings(rows),
        "msp_over_best_rival": None,
    }
    if "allocations" in arguments.parts:
        found = shared_out(bench.allocations())
        rivals = {name: loss for name, loss in found.items() if name != "msp"}
        result |= {"allocations": found, "msp_over_best_rival": round(found["msp"] / min(rivals.values()), 4)}
    if arguments.peers:
        result |= {"peak_memory_by_depth": memory_by_depth(bench), **against_llmcompressor(bench, rows)}
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model that was trained to count")
    parser.add_argument("--parts", nargs="+", choices=("grid", "finals", "allocations"), help="unset: all")
    parser.add_argument("--peers", action="store_true", help="memory by depth, and time beside llm-compressor's")
    parser.add_argument("--model", type=Path, default=Path("runs/demo-data/model"))
    parser.add_argument("--corpus", type=Path, default=Path("runs/demo-data/corpus"))
    parser.add_argument("--outside", type=Path, default=Path("runs/demo-data/outside"))
    parser.add_argument("--output", type=Path, default=Path("runs/one-shot"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no further row is begun")
    chosen = parser.parse_args(arguments)
    chosen.parts = chosen.parts or ["grid", "finals", "allocations"]
    transformers.utils.logging.disable_progress_bar()
    console = Console() if sys.stdout.isatty() else Console(width=150)
    with tempfile.TemporaryDirectory() as temporary:
        if chosen.quick:
            folder = Path(temporary)
            quick_inputs(folder)
            chosen.model, chosen.output = folder / "run" / "model", folder / "rows"
            chosen.corpus, chosen.outside = folder / "corpus", folder / "outside"
        elif not (chosen.model / "config.json").is_file():
            raise SystemExit(f"no model in {chosen.model}: python -m data_tools.demo --output runs/demo-data")
        sizes = QUICK if chosen.quick else FULL
        result = run(chosen, sizes=sizes, console=console)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        json.dumps({"benchmark": "one_shot", "quick": chosen.quick, **asdict(sizes), **result, **environment(device)})
    )


if __name__ == "__main__":
    main()
