"""What one GPU does in eight minutes: speed, memory against the plan, losses against the CPU, 2:4, one process of nccl.

    benchmarks/gpu.sh                  # sets up what is missing, says so where there is no GPU
    python benchmarks/gpu.py [--minutes 8] [--dry-run]

Steps are real ones, objective, engine and masks as a stage has them, of random models of two sizes in bf16: dense,
under masks that are learned, and beside a teacher of the same size; layer by layer compiled too. Each runs in a process
of its own, the cheapest first; what the time does not reach is named. `--dry-run` walks through all of it on the CPU
with tiny models. Ends with a table for docs/results.md and one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mask_overhead import SMOLLM2_135M  # of this folder
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from shearing.data.mixture.origins import Origins
from shearing.evaluation.environment import environment
from shearing.files.durable import read_json
from shearing.models.attention import drop_attention_mask
from shearing.models.masked import MaskedModel
from shearing.models.shape import Shape
from shearing.objectives.objective import Parts, objective_of
from shearing.objectives.recipe import DistillRecipe
from shearing.objectives.registry import DIVERGENCES
from shearing.pruning.structured.learner import MaskLearner
from shearing.pruning.structured.mask_settings import MaskSettings
from shearing.pruning.structured.masking.learned import Masking
from shearing.pruning.structured.recipe import PruneRecipe
from shearing.runs.planning.hardware import forward_flops_per_token, peak_flops, training_flops_per_token
from shearing.runs.planning.memory import Listening, Sharding, Workload
from shearing.runs.planning.step.traced_step import StepModel, Taught, measure
from shearing.training.device import compile_layers
from shearing.training.engines.optimizer import Optimization
from shearing.training.engines.torch_engine import TorchEngine
from shearing.training.learning_rates import LearningRates

KINDS = ("dense", "masked", "distilled")
GRANULARITIES = ("layers", "kv_groups", "query_heads", "intermediate", "hidden")
DISTILL = DistillRecipe(weight=0.5, domains="all")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """A model, and the text of a step of it."""

    config: dict[str, Any]
    micro_batch_size: int
    micro_batches: int
    sequence_length: int
    chunk_tokens: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.micro_batch_size * self.micro_batches * self.sequence_length


SHEARED_LLAMA_1_3B = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
TINY = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
SIZES = {
    "135M": Size(SMOLLM2_135M, micro_batch_size=16, micro_batches=2, sequence_length=2048, chunk_tokens=4096),
    "1.3B": Size(SHEARED_LLAMA_1_3B, micro_batch_size=4, micro_batches=2, sequence_length=2048, chunk_tokens=4096),
}
DRY = {"tiny": Size(TINY, micro_batch_size=2, micro_batches=2, sequence_length=32, chunk_tokens=32)}


@dataclass(frozen=True)
class Step:
    """A kind of step of a model, that is measured."""

    size: str
    kind: str
    compiled: bool
    dry: bool

    @property
    def name(self) -> str:
        """In one word, and as `--part`."""
        return f"{self.size}-{self.kind}{'-compiled' if self.compiled else ''}"

    @property
    def of(self) -> Size:
        """Its model and text."""
        return (DRY if self.dry else SIZES)[self.size]


class Training:
    """A model under way, on any device: what a step of a kind is."""

    def __init__(self, size: Size, *, kind: str, device: torch.device, bf16: bool, compiled: bool) -> None:
        self._size, self._device = size, device
        model = _random_model(size, device=device)
        self.config, self.shape = model.config, Shape.of(model.config)
        self._masking = _masking(model, device=device) if kind == "masked" else None
        if compiled:
            compile_layers(model)
        distill = DISTILL if kind == "distilled" else None
        precision = torch.bfloat16 if bf16 else torch.float32
        parts = Parts(
            model=model,
            chunk_tokens=size.chunk_tokens,
            domains=["random"],
            distill=distill,
            teacher=lambda: _teacher(size, device=device, precision=precision, compiled=compiled),
            height=lambda _: 1.0,
        )
        objective = objective_of("language_model" if distill is None else "distillation", parts=parts)
        self._engine = TorchEngine(_optimization(), device=device, precision=precision)
        self._objective = self._engine.prepare(objective)
        self._objective.train()

    def step(self, number: int) -> Tensor:
        """One step on text of its own; the mean loss, on the device."""
        size, losses = self._size, []
        generator = torch.Generator().manual_seed(number)
        rows = (size.micro_batches, size.micro_batch_size, size.sequence_length + 1)
        tokens = torch.randint(size.config["vocab_size"], rows, generator=generator).to(self._device)
        origins = Origins(domains=torch.zeros(size.micro_batch_size, dtype=torch.int64, device=self._device))
        for index, tokens_BT in enumerate(tokens):
            if self._masking is not None:
                self._masking.draw(step=number, sequence=index, of=size.micro_batches)
            with self._engine.autocast():
                loss = self._objective(tokens_BT, None, origins).total / size.tokens
            self._engine.backward(loss, last=index + 1 == size.micro_batches)
            losses.append(loss.detach())
        if self._masking is not None:
            self._masking.after_backward(step=number, scale=1.0)
        skipped = self._engine.step(step=number)
        if self._masking is not None:
            self._masking.update(step=number, skip=skipped)
        return torch.stack(losses).sum()


def _random_model(size: Size, *, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**size.config)).train().to(device)
    drop_attention_mask(model, sequence_length=size.sequence_length)
    return model


def _teacher(size: Size, *, device: torch.device, precision: torch.dtype, compiled: bool) -> PreTrainedModel:
    model = _random_model(size, device=device).to(precision)
    if compiled:
        compile_layers(model)
    return model


def _masking(model: PreTrainedModel, *, device: torch.device) -> Masking:
    """Masks of layers, MLP units and hidden dimensions, on their way to two thirds or more, with the defaults."""
    source = Shape.of(model.config)
    target = dataclasses.replace(
        source,
        num_hidden_layers=2 * source.num_hidden_layers // 3,
        intermediate_size=2 * source.intermediate_size // 3,
        hidden_size=5 * source.hidden_size // 6,
    )
    section = PruneRecipe.model_validate({"duration": 1000, "batch_size": 1, "freeze": 0})
    settings = MaskSettings.of(section, tokens_per_step=1, seed=0)
    learner = MaskLearner(
        ("layers", "intermediate", "hidden"), source=source, target=target, settings=settings, device=device
    )
    return Masking(model=MaskedModel(model), learner=learner, draws=1)


def _optimization() -> Optimization:
    rates = LearningRates(
        schedule="constant", peak=1e-4, total_steps=1000, warmup_steps=0, decay_steps=0, final=1.0, first_step=0
    )
    return Optimization(rates=rates, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.0, gradient_clipping=1.0)


def measured_step(step: Step, *, repetitions: int = 5) -> dict[str, Any]:
    """Median seconds of steps after two that warm up, and the peak of memory, beside what the plan says of both."""
    device = torch.device("cpu" if step.dry else "cuda")
    training = Training(step.of, kind=step.kind, device=device, bf16=True, compiled=step.compiled)
    began, seconds = time.perf_counter(), []
    for number in range(2 + repetitions):
        _synchronise(device)
        started = time.perf_counter()
        training.step(number)
        _synchronise(device)
        if number == 1:
            first = time.perf_counter() - began
        elif number > 1:
            seconds.append(time.perf_counter() - started)
    size, shape, middle = step.of, training.shape, statistics.median(seconds)
    flops = training_flops_per_token(shape, sequence_length=size.sequence_length)
    if step.kind == "distilled":
        flops += forward_flops_per_token(shape, sequence_length=size.sequence_length)
    peak = None if step.dry else peak_flops(torch.cuda.get_device_name(), precision=torch.bfloat16)
    used = None if step.dry else torch.cuda.max_memory_allocated()
    planned = _planned(step, config=training.config)
    return {
        "seconds": middle,
        "tokens_per_second": size.tokens / middle,
        "warm_up_seconds": first,
        "mfu": None if peak is None else flops * size.tokens / middle / peak,
        "memory": used,
        "planned_memory": planned,
        "planned_over_memory": None if used is None else planned / used,
    }


def _planned(step: Step, *, config: PretrainedConfig) -> int:
    """Bytes that `shear plan` has for the step."""
    size = step.of
    workload = Workload(
        micro_batch_size=size.micro_batch_size,
        micro_batches=size.micro_batches,
        sequence_length=size.sequence_length,
        bf16=True,
        checkpointing="none",
        chunk_tokens=size.chunk_tokens,
        masked=step.kind == "masked",
    )
    taught, listening = None, None
    if step.kind == "distilled":
        taught = Taught(config=config, distill=DISTILL, dtype=torch.bfloat16)
        buffers = 1 + DIVERGENCES["forward_kl"].buffers
        listening = Listening(shape=Shape.of(config), bf16=True, buffers=buffers)
    granularities = GRANULARITIES if step.kind == "masked" else ()
    model = StepModel(config=config, granularities=granularities, taught=taught)
    return measure(model, workload=workload, sharding=Sharding(), listening=listening).total


def agreement(*, dry: bool) -> dict[str, Any]:
    """Losses of six steps of a tiny model here, against the CPU's in fp32: the largest difference, relative."""
    worst: dict[str, float] = {}
    here = torch.device("cpu" if dry else "cuda")
    for kind, bf16 in itertools.product(KINDS, (False, True)):
        ours, theirs = (
            _losses(Training(DRY["tiny"], kind=kind, device=device, bf16=precise, compiled=False))
            for device, precise in ((here, bf16), (torch.device("cpu"), False))
        )
        worst[f"{kind}, {'bf16' if bf16 else 'fp32'}"] = float(((ours - theirs) / theirs).abs().max())
    return worst


def _losses(training: Training) -> Tensor:
    return torch.stack([training.step(number) for number in range(6)]).double().cpu()


def one_process(*, dry: bool) -> dict[str, Any]:
    """A whole run, masks and all, of one process that torchrun starts: over nccl, in bf16."""
    from distillation import quick_inputs  # of this folder

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = quick_inputs(folder, steps=50)
        keys = [f"run_dir={folder / 'once'}", "pretrain.duration=20 steps", "evaluation.baselines=[]"]
        keys += ["training.device=cpu"] if dry else ["training.precision=bf16"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        command = [*launcher, "-m", "shearing", "run", str(recipe), *keys]
        began = time.perf_counter()
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(run.stderr[-2000:])
        losses = read_json(folder / "once" / "evaluation.json")["models"]["final"]["domains"]
    mean = statistics.mean(domain["loss"] for domain in losses.values())
    return {"seconds": time.perf_counter() - began, "loss": mean}


def semi_structured(*, dry: bool) -> dict[str, Any]:
    """The last line of `semi_structured.py --quick`."""
    del dry  # without a device for it, that line says so
    command = [sys.executable, str(HERE / "semi_structured.py"), "--quick"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def parts(*, dry: bool) -> Iterator[str]:
    """What is measured, in order: what shows that it works at all, then speed by size, then the rest."""
    yield "agreement"
    yield "one-process"
    for size, compiled in itertools.product(DRY if dry else SIZES, (False,) if dry else (False, True)):
        yield from (Step(size, kind, compiled=compiled, dry=dry).name for kind in KINDS)
    yield "semi-structured"


def measured(part: str, *, dry: bool) -> dict[str, Any]:
    """One part, in this process."""
    others = {"agreement": agreement, "one-process": one_process, "semi-structured": semi_structured}
    if part in others:
        return others[part](dry=dry)
    size, kind, *compiled = part.split("-")
    return measured_step(Step(size, kind, compiled=bool(compiled), dry=dry))


def in_fresh_process(part: str, *, deadline: float) -> dict[str, Any]:
    """`measured` in a process of its own: nothing of the others is on the GPU. Why not, where it fails."""
    command = [sys.executable, __file__, "--part", part]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=max(1.0, deadline - time.monotonic())
        )
    except subprocess.TimeoutExpired:
        return {"left_out": "no time left"}
    if run.returncode:
        return {"failed": run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"exit {run.returncode}"}
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def markdown_of(results: dict[str, dict[str, Any]]) -> str:
    """The steps as a table for documents."""
    lines = [
        "| step | s | tokens/s | MFU | GB | plan, GB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in results.items():
        if "tokens_per_second" not in row:
            continue
        mfu, memory = row["mfu"], row["memory"]
        cells = (
            f"{row['seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            "–" if mfu is None else f"{100 * mfu:.0f} %",
            "–" if memory is None else f"{memory / 1e9:.1f}",
            f"{row['planned_memory'] / 1e9:.2f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure what there is time for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is begun")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU, in this process")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(measured(arguments.part, dry=False)))
        return
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        print(json.dumps({"benchmark": "gpu", "device": None, "left_out": "torch sees no GPU"}))
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    deadline = time.monotonic() + 60 * arguments.minutes
    results: dict[str, dict[str, Any]] = {}
    for part in parts(dry=dry):
        results[part] = measured(part, dry=True) if dry else in_fresh_process(part, deadline=deadline)
        print(f"{part}: {json.dumps(results[part])[:160]}", flush=True)
    print(markdown_of(results))
    device = torch.device("cpu" if dry else "cuda")
    print(json.dumps({"benchmark": "gpu", "dry_run": dry, "parts": results, "environment": environment(device)}))


if __name__ == "__main__":
    main()
