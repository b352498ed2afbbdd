"""One-shot sparsity of a real model: perplexity, time and memory of each criterion at 50 %, 4:8 and 2:4 (N kept of M).

    python benchmarks/one_shot.py [--quick] [--more METHOD …] [--model runs/demo-data/model]
        [--corpus runs/demo-data/corpus]

Each model is made in a process of its own, whose peak memory is reported, and measured on held-out text of the corpus;
calibration text is of its training split. The same model cut to a third of its layers tells whether memory grows with
depth. Where llm-compressor is installed (`make compare-llmcompressor` makes such an environment) it prunes the same
model on the same rows, and `time_ratio_to_llmcompressor` is our time over its time, the larger of wanda's and
sparsegpt's at 2:4: from the dense model's files to the sparse model's, ours with masks, checksums and manifest.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from shearing.data.corpus.corpus import Corpus
from shearing.evaluation.environment import environment
from shearing.evaluation.heldout import heldout_loss, macro_mean
from shearing.models.loading import load_source
from shearing.progress import max_memory
from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.calibration.text import load_calibration
from shearing.pruning.sparse.criteria import criteria
from shearing.pruning.sparse.one_shot import sparsify
from shearing.pruning.sparse.patterns import pattern_of
from shearing.pruning.sparse.recipe import SparsifyRecipe
from shearing.pruning.sparse.reconstruction import reconstructions
from shearing.pruning.sparse.reconstruction.reconstruction import Choice
from shearing.pruning.sparse.stored.check import differences
from shearing.pruning.sparse.stored.manifest import read_manifest

# The server imports everything once; each measurement is a fork of it that has computed nothing yet.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "shearing.pruning.sparse.one_shot",
        "shearing.evaluation.heldout",
        "transformers",
    ]
)
METHODS: dict[str, dict[str, Any]] = {name: {"criterion": name} for name in ("magnitude", "wanda", "sparsegpt")}
MORE_METHODS = {
    "wanda, obs": {"criterion": "wanda", "reconstruction": "obs"},
    "sparsegpt, true sequential": {"criterion": "sparsegpt", "true_sequential": True},
}
PATTERNS: dict[str, dict[str, Any]] = {"50%": {"sparsity": 0.5}, "4:8": {"pattern": "4:8"}, "2:4": {"pattern": "2:4"}}


@dataclass(frozen=True)
class Sizes:
    """How much text is read, in tokens."""

    samples: int
    seqlen: int
    heldout: int


QUICK = Sizes(samples=8, seqlen=128, heldout=512)
FULL = Sizes(samples=32, seqlen=256, heldout=2048)


def recipe_of(model: Path, output: Path, *, method: str, pattern: str, corpus: Path, sizes: Sizes) -> SparsifyRecipe:
    """What `shear sparsify` is told."""
    return SparsifyRecipe.model_validate(
        {
            "model": str(model),
            "output": output,
            **{**METHODS, **MORE_METHODS}[method],
            "calibration": [corpus],
            "samples": sizes.samples,
            "seqlen": sizes.seqlen,
            **PATTERNS[pattern],
        }
    )


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
        "peak_memory_above_start": watch.peak() if not torch.cuda.is_available() else max_memory(),
    }


def prune_and_evaluate(recipe: SparsifyRecipe, corpus: Path, sizes: Sizes) -> dict[str, Any]:
    """`prune`, then `evaluate`."""
    return {**prune(recipe), **evaluate(recipe.output, corpus, sizes)}


def evaluate(folder: Path, corpus: Path, sizes: Sizes) -> dict[str, Any]:
    """Held-out loss by domain and perplexity of the mean."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    losses = heldout_loss(
        load_source(str(folder), device=device),
        Corpus.open(corpus),
        split="test",
        tokens_per_domain=sizes.heldout,
        sequence_length=sizes.seqlen,
        micro_batch_size=4,
    )
    mean = macro_mean(losses)
    return {"perplexity": mean.perplexity, "loss": mean.loss, "domains": {name: of.loss for name, of in losses.items()}}


def prune_with_llmcompressor(model: Path, corpus: Path, sizes: Sizes, criterion: str) -> dict[str, Any]:
    """The same rows, at 2:4, with llm-compressor (its N:M counts what is pruned, which is the same here)."""
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


def output_errors(model: Path, corpus: Path, sizes: Sizes) -> dict[str, Any]:
    """Error of each linear layer's output at 2:4 on the dense model's inputs: SparseGPT's over Wanda's."""
    dense = load_source(str(model))
    calibration = load_calibration(
        [corpus],
        tokenizer=AutoTokenizer.from_pretrained(model),
        vocab_size=dense.config.vocab_size,
        samples=sizes.samples,
        seqlen=sizes.seqlen,
        seed=0,
    )
    statistics: dict[str, InputStatistics] = {}
    linears = {
        name: module
        for name, module in dense.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    needs: frozenset[Need] = frozenset({"squares", "moment"})
    for name, module in linears.items():
        statistics[name] = InputStatistics(module.in_features, needs=needs, device=dense.device)
        add = statistics[name].add
        module.register_forward_pre_hook(lambda _, arguments, add=add: add(arguments[0]))
    ratios: dict[str, float] = {}
    with torch.no_grad():
        for rows in calibration.tokens.split(4):
            dense.model(input_ids=rows, use_cache=False)
        for name, module in linears.items():
            of_inputs, errors = statistics.pop(name), []
            for criterion, way in (("sparsegpt", "obs"), ("wanda", "none")):
                choice = Choice(criteria()[criterion], pattern_of("2:4"), of_inputs)
                lost = module.weight - reconstructions()[way].prune(module.weight, choice=choice)[0]
                errors.append(float(((lost @ of_inputs.moment) * lost).sum()))
            ratios[name] = errors[0] / errors[1]
    largest = max(ratios, key=ratios.__getitem__)
    return {"mean": sum(ratios.values()) / len(ratios), "largest": ratios[largest], "largest_is": largest}


def cut_to(model: Path, output: Path, *, layers: int) -> Path:
    """The first layers of a model, as a model."""
    short = AutoModelForCausalLM.from_pretrained(model)
    del short.model.layers[layers:]
    short.config.num_hidden_layers = layers
    if getattr(short.config, "layer_types", None):
        short.config.layer_types = short.config.layer_types[:layers]
    short.save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)
    return output


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
    sender.send(function(*arguments))
    sender.close()


def measure(
    model: Path, corpus: Path, folder: Path, *, methods: Iterable[str], sizes: Sizes, console: Console
) -> dict[str, Any]:
    """Every model of the table."""
    rows: dict[str, Any] = {"dense": _in_process(evaluate, model, corpus, sizes)}
    for pattern in PATTERNS:
        for method in methods:
            output = folder / "sparse"
            recipe = recipe_of(model, output, method=method, pattern=pattern, corpus=corpus, sizes=sizes)
            row = rows[f"{method} {pattern}"] = _in_process(prune_and_evaluate, recipe, corpus, sizes)
            assert differences(output) == []
            console.print(f"{method} {pattern}: perplexity {row['perplexity']:.2f}, {row['seconds']:.1f} s")
            _remove(output)
    return rows


def memory_by_depth(model: Path, corpus: Path, folder: Path, *, sizes: Sizes, console: Console) -> dict[str, Any]:
    """Peak memory of wanda and sparsegpt at 2:4 on a third of the layers and on all."""
    layers = load_layers(model)
    found: dict[str, Any] = {}
    for depth in (layers // 3, layers):
        short = model if depth == layers else cut_to(model, folder / "short", layers=depth)
        for criterion in ("wanda", "sparsegpt"):
            recipe = recipe_of(short, folder / "depth", method=criterion, pattern="2:4", corpus=corpus, sizes=sizes)
            peak = _in_process(prune, recipe)["peak_memory_above_start"]
            found.setdefault(criterion, {})[depth] = peak
            console.print(f"{criterion} 2:4, {depth} layers: peak memory {peak / 1e6:.0f} MB above start")
            _remove(folder / "depth")
    return found


def load_layers(model: Path) -> int:
    """Number of decoder layers."""
    count: int = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    return count


def against_llmcompressor(rows: dict[str, Any], model: Path, corpus: Path, sizes: Sizes) -> dict[str, Any]:
    """Our time over its time; None where it is not installed."""
    if importlib.util.find_spec("llmcompressor") is None:
        return {"time_ratio_to_llmcompressor": None}
    theirs = {
        criterion: _in_process(prune_with_llmcompressor, model, corpus, sizes, criterion)
        for criterion in ("wanda", "sparsegpt")
    }
    ratios = {criterion: rows[f"{criterion} 2:4"]["seconds"] / of["seconds"] for criterion, of in theirs.items()}
    return {"time_ratio_to_llmcompressor": round(max(ratios.values()), 3), "llmcompressor": theirs, "ratios": ratios}


def print_table(rows: dict[str, Any], *, console: Console) -> None:
    table = Table(title="one-shot sparsity, N:M is N kept of M")
    table.add_column("model", no_wrap=True)
    for name in ("perplexity", "seconds", "passes", "metric", "peak MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in rows.items():
        timed = ("seconds", "forward_seconds", "metric_seconds")
        times = [f"{row[key]:.2f}" if key in row else "–" for key in timed]
        size = f"{row['peak_memory_above_start'] / 1e6:.0f}" if "peak_memory_above_start" in row else "–"
        table.add_row(name, f"{row['perplexity']:.2f}", *times, size)
    console.print(table)


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="little text, and only what was published")
    parser.add_argument("--more", nargs="*", choices=[*MORE_METHODS], help="rows beside the three published methods")
    parser.add_argument("--model", type=Path, default=Path("runs/demo-data/model"))
    parser.add_argument("--corpus", type=Path, default=Path("runs/demo-data/corpus"))
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        raise SystemExit(f"no model in {arguments.model}: python -m data_tools.demo --output runs/demo-data")
    transformers.utils.logging.disable_progress_bar()
    sizes, console = QUICK if arguments.quick else FULL, Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        more = ([] if arguments.quick else list(MORE_METHODS)) if arguments.more is None else arguments.more
        methods = [*METHODS, *more]
        rows = measure(arguments.model, arguments.corpus, folder, methods=methods, sizes=sizes, console=console)
        errors = _in_process(output_errors, arguments.model, arguments.corpus, sizes)
        console.print(f"output error at 2:4, SparseGPT's over Wanda's: {errors}")
        depth = memory_by_depth(arguments.model, arguments.corpus, folder, sizes=sizes, console=console)
    print_table(rows, console=console)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ordered = {
        pattern: all(
            rows[f"magnitude {pattern}"]["loss"] > rows[f"{criterion} {pattern}"]["loss"] > rows["dense"]["loss"]
            for criterion in ("wanda", "sparsegpt")
        )
        for pattern in PATTERNS
    }
    result = {
        "benchmark": "one_shot",
        "quick": arguments.quick,
        "samples": sizes.samples,
        "seqlen": sizes.seqlen,
        "heldout_tokens_per_domain": sizes.heldout,
        "models": rows,
        "magnitude_worst": ordered,
        "sparsegpt_error_over_wanda": errors,
        "peak_memory_by_depth": depth,
        **against_llmcompressor(rows, arguments.model, arguments.corpus, sizes),
        **environment(device),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
