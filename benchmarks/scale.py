"""Whether any process ever needs the whole model: peak host memory of each of them, step by step of a whole run.

    python benchmarks/scale.py [--quick] [--models 0.5B 1.5B] [--processes 2 4] [--engines fsdp2 zero3]
                               [--precisions fp32 bf16]

A random model, stored in bf16, goes through mask learning (loaded, reference losses, ranked, refitted, shared out,
trained, saved), is cut, trained on and evaluated, by the stages of a run as they are, on several processes over gloo.
Text is as little as will do: activations are next to nothing, so what is measured is where weights are. Buffers whose
sizes are fixed numbers, made for models of billions, are set to what they are of such a model; FSDP2 sums gradients
after each micro-batch (`training.fsdp2.sum_gradients: micro_batch`), or every process would add up whole ones; a
checkpoint is written in the foreground, as its copy on the host, 12 bytes for each parameter of a share, would lie in
the same memory as what a GPU holds.

What a process holds is sampled from outside, 200 times a second: memory that is its own (no pages of files), less what
it had when it began to load. Its *share* is what the engine's steps cannot do without: weights, gradients and two
moments in fp32, 16 bytes for each parameter, divided by the number of processes; with products in bf16 too, as weights
are updated in fp32. The C library is told to give freed memory back at once, so that a step's peak is not what an
earlier one has left.

`worst_peak_over_share`: the highest peak of any process in any step, over its share. `rank0_over_others`: the highest
peak of the main process over the highest of any other. Both are the worst of all runs; rows have those of each step.
A run that this machine's memory has no room for is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from itertools import product
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, PreTrainedTokenizerFast

from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.data.corpus.writer import CorpusWriter
from shearing.evaluation.environment import environment
from shearing.models.loading import skeleton
from shearing.models.shape import Shape
from shearing.models.stored.saving import write_model

MODELS: Mapping[str, dict[str, Any]] = {
    "8M": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "34M": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "0.5B": {
        "vocab_size": 32000,
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "1.5B": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
}
ENGINES = ("fsdp2", "zero3", "torch")
STEPS: Mapping[str, str] = {
    "shearing.runs.stages.prune:load_to_train": "load",
    "shearing.runs.stages.prune:reference_losses": "reference losses",
    "shearing.runs.stages.prune:_initial_scores": "rank",
    "shearing.runs.stages.prune:_refit": "refit",
    "shearing.training.engines.fsdp2_engine:Fsdp2Engine.prepare": "share out",
    "shearing.training.engines.deepspeed_engine:DeepSpeedEngine.prepare": "share out",
    "shearing.training.engines.torch_engine:TorchEngine.prepare": "share out",
    "shearing.runs.stages.prune:train": "train",
    "shearing.training.engines.held_state:StagedShard.write_into": "save",
    "shearing.runs.stages.prune:_finish": "end of mask learning",
    "shearing.runs.stages.compact:compact": "cut",
    "shearing.runs.stages.pretrain:load_to_train": "load what was cut",
    "shearing.runs.stages.pretrain:train": "train on",
    "shearing.runs.stages.pretrain:_finish": "write the result",
    "shearing.runs.stages.evaluate:evaluate": "evaluate",
}
"""What a run calls, and the step that this is; inside of another it is a step of its own."""

BYTES_OF_PARAMETER = 16
SAMPLES_PER_SECOND = 200
WORDS = 60


def write_inputs(folder: Path, config: LlamaConfig) -> None:
    """A random model and random text; no more than a tensor of the model is ever in memory."""
    generator = torch.Generator().manual_seed(0)
    bones = skeleton(config)
    weights = (
        (name, torch.ones(of.shape) if of.ndim == 1 else 0.02 * torch.randn(of.shape, generator=generator))
        for name, of in bones.named_parameters()
    )
    write_model(bones, folder / "model", weights=weights, dtype=torch.bfloat16)
    words = Tokenizer(WordLevel({"<unk>": 0, "<end>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    tokenizer.save_pretrained(folder / "model")
    drawn = np.random.default_rng(0)
    writer = CorpusWriter(
        folder / "corpus",
        vocab_size=len(tokenizer),
        separator_id=1,
        tokenizer="random",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        validation_fraction=0.2,
        test_fraction=0.2,
    )
    for name in ("first", "second"):
        with writer.domain(name, sources=["drawn at random"], inputs=name) as domain:
            for _ in range(60):
                ids = drawn.integers(2, WORDS + 2, size=40)
                domain.add(" ".join(f"w{i - 2}" for i in ids), token_ids=ids)
    writer.finish()


def num_parameters(model: Mapping[str, Any]) -> int:
    """Of all of a model; embedding and head are two."""
    return Shape.of(LlamaConfig(**model, tie_word_embeddings=False)).num_parameters()


def training_of(engine: str, *, parameters: int) -> dict[str, Any]:
    """The section of a recipe."""
    if engine != "zero3":
        return {"engine": engine, "fsdp2": {"sum_gradients": "micro_batch"}}
    buffer = parameters // 32  # of 7B, what DeepSpeed and its section here have for every model
    sizes = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
    live = dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), parameters // 8)
    zero = {**dict.fromkeys(sizes, buffer), **live}
    return {"engine": "deepspeed", "deepspeed": {"zero_stage": 3, "config": {"zero_optimization": zero}}}


def recipe_of(
    inputs: Path, *, run_dir: Path, model: Mapping[str, Any], engine: str, precision: str, processes: int
) -> dict[str, Any]:
    """Two steps of each stage, to half of the layers and of everything in them."""
    stage = {
        "duration": "2 steps",
        "batch_size": f"{2 * processes} sequences",
        "micro_batch_size": 1,
        "learning_rate": 1e-4,
        "checkpoint_interval": "2 steps",
        "keep_last": 1,
    }
    halves = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {
        "name": "scale",
        "run_dir": str(run_dir),
        "model": {"source": str(inputs / "model")},
        "data": {"corpus": str(inputs / "corpus"), "sequence_length": 16},
        "target": {name: model[name] // 2 for name in halves},
        "mixture": {"interval": "2 steps", "pretrain_interval": "2 steps", "heldout_tokens": 32},
        "prune": {**stage, "initial_masks": "activations", "calibration_tokens": 64, "freeze": "1 step"},
        "pretrain": stage,
        # Written in the background, a checkpoint is copied to the host's memory, which here is the device's too.
        "training": {
            "precision": precision,
            "device": "cpu",
            "memory_check": "warn",
            "checkpoint_writing": "foreground",
        }
        | training_of(engine, parameters=num_parameters(model)),
        "evaluation": {
            "tokens_per_domain": 32,
            "baselines": ["random"],
            "speed": False,
            "generation": {"prompts": 2, "prompt_tokens": 4, "tokens": 4, "text_tokens": 32},
            "placement": "shard",
        },
    }


def work(recipe: dict[str, Any], rank: int, size: int, port: int, marks: Path) -> None:
    """What a process runs: all stages; the main one says when which step begins."""
    from rich.console import Console

    from shearing.runs.recipe import Recipe
    from shearing.runs.stages.run import run

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    if rank == 0:
        mark_steps(marks)
    run(Recipe.model_validate(recipe), console=Console(quiet=True))


def mark_steps(marks: Path) -> None:
    """Have every call of `STEPS` write when it begins, and when what was before goes on."""
    under_way = ["between"]

    def note() -> None:
        with marks.open("a", encoding="utf-8") as file:
            file.write(f"{time.monotonic()} {under_way[-1]}\n")

    def marked(function: Callable[..., Any], step: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            under_way.append(step)
            note()
            try:
                return function(*arguments, **keywords)
            finally:
                under_way.pop()
                note()

        return call

    for place, step in STEPS.items():
        owner, _, name = place.replace(":", ".").rpartition(".")
        setattr(resolve_name(owner), name, marked(resolve_name(place), step))


class Samples(threading.Thread):
    """What processes hold, over time."""

    def __init__(self, processes: Sequence[BaseProcess]) -> None:
        super().__init__(daemon=True)
        self._files = [Path(f"/proc/{process.pid}/status") for process in processes]
        self._ended = threading.Event()
        self.times: list[float] = []
        self.bytes: list[list[int]] = []

    def run(self) -> None:
        """Until `end`."""
        while not self._ended.wait(1 / SAMPLES_PER_SECOND):
            try:
                held = [_own_bytes(file) for file in self._files]
            except (OSError, KeyError):  # one has ended
                continue
            self.times.append(time.monotonic())
            self.bytes.append(held)

    def end(self) -> None:
        """No more of them."""
        self._ended.set()
        self.join()

    def peaks(self, marks: Sequence[tuple[float, str]]) -> dict[str, list[int]]:
        """The highest of each process in each step, less what it had when the first one began."""
        times, held = np.array(self.times), np.array(self.bytes)
        first = int(np.searchsorted(times, marks[0][0]))
        held = held - held[max(0, first - 1)]
        ends = [when for when, _ in marks[1:]] + [times[-1] + 1]
        peaks: dict[str, list[int]] = {}
        for (begin, step), end in zip(marks, ends, strict=True):
            inside = held[(times >= begin) & (times < end)]
            if step != "between" and len(inside):
                before = peaks.get(step, [0] * held.shape[1])
                peaks[step] = [max(a, int(b)) for a, b in zip(before, inside.max(0), strict=True)]
        return peaks


def _own_bytes(status: Path) -> int:
    lines = status.read_text(encoding="utf-8").splitlines()
    kilobytes = {
        name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "Rss" in name
    }
    return 1024 * (kilobytes["RssAnon"] + kilobytes["RssShmem"])


def measure(model: str, engine: str, precision: str, size: int, *, inputs: Path, folder: Path) -> dict[str, Any]:
    """One run on fresh processes."""
    config = MODELS[model]
    parameters = num_parameters(config)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        sorted({place.partition(":")[0] for place in STEPS} | ({"deepspeed"} if engine == "zero3" else set()))
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    marks = folder / "marks.txt"
    run_dir = folder / "run"
    recipe = recipe_of(inputs, run_dir=run_dir, model=config, engine=engine, precision=precision, processes=size)
    started = time.monotonic()
    processes = [context.Process(target=work, args=(recipe, rank, size, port, marks)) for rank in range(size)]
    for process in processes:
        process.start()
    samples = Samples(processes)
    samples.start()
    running = list(processes)
    while running:
        wait([process.sentinel for process in running])
        running = [process for process in running if process.is_alive()]
        if any(process.exitcode for process in processes):  # the others would wait for it
            for process in running:
                process.terminate()
    samples.end()
    if any(process.exitcode for process in processes):
        sys.exit(
            f"{model}, {engine}, {precision}, {size} processes ended with {[process.exitcode for process in processes]}"
        )
    lines = (line.split(" ", 1) for line in marks.read_text(encoding="utf-8").splitlines())
    peaks = samples.peaks([(float(when), step) for when, step in lines])
    share = BYTES_OF_PARAMETER * parameters // size
    ours = max(of[0] for of in peaks.values())
    others = max(max(of[1:]) for of in peaks.values())
    return {
        "model": model,
        "engine": engine,
        "precision": precision,
        "processes": size,
        "parameters": parameters,
        "share": share,
        "steps": {step: [round(each / share, 3) for each in of] for step, of in peaks.items()},
        "worst_peak_over_share": round(max(ours, others) / share, 3),
        "rank0_over_others": round(ours / others, 3),
        "seconds": round(time.monotonic() - started, 1),
    }


def no_room(model: str, size: int) -> str | None:
    """Why a run is left out; None: it is not."""
    parameters = num_parameters(MODELS[model])
    wanted = 1.5 * BYTES_OF_PARAMETER * parameters + size * 0.5e9
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    disk = shutil.disk_usage(tempfile.gettempdir()).free
    if wanted > free:
        return f"{wanted / 1e9:.1f} GB of memory wanted, {free / 1e9:.1f} free"
    if 30 * parameters > disk:
        return f"{30 * parameters / 1e9:.1f} GB of disk wanted, {disk / 1e9:.1f} free"
    return None


def table(row: Mapping[str, Any]) -> Iterator[str]:
    """A run's steps, in words."""
    yield (
        f"{row['model']}, {row['engine']}, {row['precision']}, {row['processes']} processes: a share is "
        f"{row['share'] / 1e6:,.0f} MB; {row['seconds']:.0f} s"
    )
    for step, of in row["steps"].items():
        yield f"{step:>22}  main {of[0]:5.2f}   others {' '.join(f'{each:5.2f}' for each in of[1:])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model on two processes, about a minute")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--processes", nargs="+", type=int)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["fsdp2", "zero3"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    arguments = parser.parse_args()
    models = arguments.models or (["34M"] if arguments.quick else ["0.5B", "1.5B"])
    sizes = arguments.processes or ([2] if arguments.quick else [2, 4])
    # Above this size, memory that is freed goes back at once.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for model in models:
        with tempfile.TemporaryDirectory() as inputs:
            write_inputs(Path(inputs), LlamaConfig(**MODELS[model], tie_word_embeddings=False))
            for engine, precision, size in product(arguments.engines, arguments.precisions, sizes):
                name = f"{model}, {engine}, {precision}, {size} processes"
                if (why := no_room(model, size)) is not None:
                    left_out[name] = why
                    print(f"{name}: left out, {why}", flush=True)
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    row = measure(model, engine, precision, size, inputs=Path(inputs), folder=Path(folder))
                rows.append(row)
                print("\n".join(table(row)), flush=True)
    worst = {
        name: max((row[name] for row in rows), default=None) for name in ("worst_peak_over_share", "rank0_over_others")
    }
    print(
        json.dumps(
            {
                "benchmark": "scale",
                "quick": arguments.quick,
                **worst,
                "runs": rows,
                "left_out": left_out,
                "environment": environment(torch.device("cpu")),
            }
        )
    )


if __name__ == "__main__":
    main()
