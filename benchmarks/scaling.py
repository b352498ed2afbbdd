"""What an engine costs: steps of the torch engine, FSDP2, ZeRO 1 to 3, DistributedDataParallel and the HF Trainer.

    python benchmarks/scaling.py [--quick]

Every side trains the same random model on the same global batch, cut into the same micro-batches, with clipping and
fused AdamW; the engines as the training loop drives them:

- `compute`: forward and backward passes alone, no gradient leaves its process: what no engine can do without.
- `ddp`: a plain loop around DistributedDataParallel, `no_sync` on all but the last micro-batch. With one process the
  wrapper is left out, as it would only cost.
- `torch`, `fsdp2`, `zero1`, `zero2`, `zero3`: our engines.
- `trainer`: transformers' Trainer with the model's own loss. On a CPU with one process, as it does not share out work
  there.

A turn is a fresh group of processes, one torch thread each on a CPU, one GPU each otherwise, that takes warm-up steps
and then timed ones. Sides take turns, from another one on in each round. Figures and ratios are of the fastest step of
all rounds, because what else runs on the machine only ever adds to a step; on a machine with other work, add rounds.
`spread` says whether they can be relied on: a side's slowest round over its fastest, as times.

`update_share` is the share of a step's time outside of the calls of forward and backward: `engine.step` and everything
else; the clock of a GPU's own stream where there is one. `overhead_share` also has what an engine does inside of the
backward pass, DDP's reductions for instance: 1 - time of `compute` / time of the side. With bf16 it can be negative:
FSDP2 and ZeRO 1 to 3 compute with bf16 weights and `compute` casts fp32 ones.

Checkpoints are written through `Checkpoints`: all processes, flushed to disk, checksums. `load` is `Engine.load` with
its comparison of fingerprints, `verify` the reading of checksums before it. `bytes` is of the folder.

A step on a CPU has 1,024 tokens, as the demo's. Where models are really trained it has a hundred times more, and
what an engine does once a step weighs as much less: these shares are upper bounds.

Ratios are of tokens/s on all processes (one if there is one GPU): `deepspeed_over_ddp` (ZeRO-1), `torch_over_ddp`, and
`engine_over_trainer` (the torch engine) on as many processes as `trainer` was measured on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

from shearing.evaluation.environment import environment
from shearing.files.durable import read_json
from shearing.models.attention import drop_attention_mask
from shearing.objectives.language_model import LanguageModelLoss
from shearing.processes.processes import Processes
from shearing.training.checkpoints.checkpoints import FINGERPRINTS, Checkpoints
from shearing.training.engines.deepspeed_engine import DeepSpeedEngine
from shearing.training.engines.engine import Engine
from shearing.training.engines.fsdp2_engine import Fsdp2Engine
from shearing.training.engines.optimizer import Optimization, adamw
from shearing.training.engines.torch_engine import TorchEngine
from shearing.training.learning_rates import LearningRates
from shearing.training.recipe import DeepSpeedRecipe, Fsdp2Recipe

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
QUICK = {**SMOLLM2_135M, "vocab_size": 4096, "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6}
LLAMA = "transformers.models.llama.modeling_llama"
ENGINES = ("torch", "fsdp2", "zero1", "zero2", "zero3")
OPTIMIZATION = Optimization(
    rates=LearningRates(
        schedule="cosine",
        peak=1e-4,
        total_steps=1_000_000,
        warmup_steps=0,
        decay_steps=0,
        final=0.1,
        first_step=0,
    ),
    betas=(0.9, 0.95),
    epsilon=1e-8,
    weight_decay=0.1,
    gradient_clipping=1.0,
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every side computes.

    Attributes:
        sequences: global batch.
        micro_batch_size: sequences per forward pass of one process.
        rounds: turns of each side.
        checkpoint_rounds: the first rounds, in which checkpoints are written and read too.
    """

    model: dict[str, int | bool]
    sequences: int
    micro_batch_size: int
    sequence_length: int
    precision: str
    rounds: int
    checkpoint_rounds: int
    warmup_steps: int
    timed_steps: int


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one process says of its turn, in seconds.

    Attributes:
        step: the fastest whole step.
        update: its part outside of forward and backward calls.
        checkpoint: seconds to save, verify and load, and bytes; empty where there was none.
    """

    step: float
    update: float
    checkpoint: dict[str, float] = field(default_factory=dict)


class Marks:
    """Points in time, two of each step: its start, and where its update starts.

    On a GPU they are points of the device's stream, which is not waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._points: list[Any] = []

    def set(self) -> None:
        """The next point."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._points.append(event)
        else:
            self._points.append(time.perf_counter())

    def fastest(self) -> tuple[float, float]:
        """Seconds of the fastest step between two starts, and of its update."""
        if self._on_gpu:
            torch.cuda.synchronize()
        starts, updates = self._points[::2], self._points[1::2]
        return min(
            (self._seconds(start, end), self._seconds(update, end))
            for start, update, end in zip(starts[:-1], updates, starts[1:], strict=True)
        )

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_gpu else end - start


class Plain:
    """What people write themselves, behind the engines' interface: DistributedDataParallel, clipping, fused AdamW.

    Args:
        updates: False: gradients are dropped where they arose, the side `compute`.
    """

    def __init__(self, *, device: torch.device, precision: torch.dtype, processes: Processes, updates: bool) -> None:
        self.device, self._precision, self._processes, self._updates = device, precision, processes, updates

    def prepare(self, objective: nn.Module) -> nn.Module:
        """See `Engine.prepare`."""
        self._model = objective.to(self.device)
        self._parameters = list(objective.parameters())
        self._optimizer = adamw(self._parameters, optimization=OPTIMIZATION)
        if self._updates and self._processes.size > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self._model = DistributedDataParallel(objective, device_ids=ids)
        return self._model

    def forward_context(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        """Around forward and backward of a micro-batch."""
        if not last and isinstance(self._model, DistributedDataParallel):
            return self._model.no_sync()
        return contextlib.nullcontext()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """See `Engine.autocast`."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._precision == torch.bfloat16)

    def backward(self, loss: Tensor, *, last: bool) -> None:  # noqa: ARG002  as the engines have it
        """See `Engine.backward`."""
        (loss * self._processes.size).backward()  # DistributedDataParallel averages

    def step(self, *, step: int) -> None:  # noqa: ARG002
        """See `Engine.step`."""
        if self._updates:
            nn.utils.clip_grad_norm_(self._parameters, OPTIMIZATION.gradient_clipping)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def make_engine(side: str, *, workload: Workload, device: torch.device, processes: Processes) -> Engine | Plain:
    """What computes a side's steps."""
    precision = torch.bfloat16 if workload.precision == "bf16" else torch.float32
    if side in ("compute", "ddp"):
        return Plain(device=device, precision=precision, processes=processes, updates=side == "ddp")
    if side == "torch":
        return TorchEngine(OPTIMIZATION, device=device, precision=precision, processes=processes)
    if side == "fsdp2":
        settings = Fsdp2Recipe()
        return Fsdp2Engine(OPTIMIZATION, settings=settings, device=device, precision=precision, processes=processes)
    return DeepSpeedEngine(
        OPTIMIZATION,
        settings=DeepSpeedRecipe(zero_stage=int(side.removeprefix("zero"))),
        device=device,
        precision=precision,
        processes=processes,
        micro_batch_size=workload.micro_batch_size,
        accumulation=workload.sequences // processes.size // workload.micro_batch_size,
    )


def time_steps(
    side: str, *, workload: Workload, device: torch.device, processes: Processes, folder: Path | None
) -> Turn:
    """A turn of any side but `trainer`.

    Args:
        folder: where checkpoints go; None: none are written.
    """
    engine = make_engine(side, workload=workload, device=device, processes=processes)
    model = make_model(workload)
    objective = engine.prepare(LanguageModelLoss(model, chunk_tokens=1024))
    objective.train()
    batches = [
        tokens.tensor_split(processes.size)[processes.rank].to(device).split(workload.micro_batch_size)
        for tokens in make_batches(workload)
    ]
    marks = Marks(device)
    for step, micro_batches in enumerate(batches):
        if step == workload.warmup_steps:
            wait_for_all(processes, device=device)
            marks = Marks(device)
        marks.set()
        for index, micro_batch in enumerate(micro_batches):
            last = index + 1 == len(micro_batches)
            with engine.forward_context(last=last) if isinstance(engine, Plain) else contextlib.nullcontext():
                with engine.autocast():
                    loss = objective(micro_batch).total / (workload.sequences * workload.sequence_length)
                engine.backward(loss, last=last)
        marks.set()
        engine.step(step=step)
    marks.set()
    wait_for_all(processes, device=device)
    seconds, update = marks.fastest()
    with_checkpoint = folder is not None and not isinstance(engine, Plain)
    checkpoint = time_checkpoint(engine, folder=folder, processes=processes) if with_checkpoint else {}
    return Turn(step=seconds, update=update, checkpoint=checkpoint)


def time_checkpoint(engine: Engine, *, folder: Path, processes: Processes) -> dict[str, float]:
    """One checkpoint, written and read."""
    checkpoints = Checkpoints(folder, keep_last=1, processes=processes)
    device = engine.device

    def timed(function: Callable[[], object]) -> float:
        wait_for_all(processes, device=device)
        started = time.perf_counter()
        function()
        wait_for_all(processes, device=device)
        return time.perf_counter() - started

    save = timed(lambda: checkpoints.save(step=1, write=lambda folder: engine.stage().write_into(folder)))
    place = checkpoints.place(1)
    return {
        "save_seconds": save,
        "verify_seconds": timed(checkpoints.newest),
        "load_seconds": timed(lambda: engine.load(place, saved=read_json(place / FINGERPRINTS))),
        "bytes": sum(path.stat().st_size for path in place.iterdir()),
    }


class Clock(TrainerCallback):
    """Marks the Trainer's steps after the warm-up; clipping comes before the mark, so its update lacks that."""

    def __init__(self, workload: Workload, *, device: torch.device, processes: Processes) -> None:
        self.marks = Marks(device)
        self._workload, self._device, self._processes = workload, device, processes

    def on_pre_optimizer_step(self, _arguments: object, state: Any, *_: object, **__: object) -> None:
        """Before AdamW's step."""
        if state.global_step >= self._workload.warmup_steps:
            self.marks.set()

    def on_step_end(self, _arguments: object, state: Any, *_: object, **__: object) -> None:
        """After all of a step; the next one starts."""
        if state.global_step == self._workload.warmup_steps:
            wait_for_all(self._processes, device=self._device)
        if state.global_step >= self._workload.warmup_steps:
            self.marks.set()


def time_trainer(*, workload: Workload, device: torch.device, processes: Processes) -> Turn:
    """A turn of `trainer`."""
    rows = torch.cat(make_batches(workload))[:, :-1]
    clock = Clock(workload, device=device, processes=processes)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=make_model(workload),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=workload.micro_batch_size,
                gradient_accumulation_steps=workload.sequences // processes.size // workload.micro_batch_size,
                max_steps=workload.warmup_steps + workload.timed_steps,
                learning_rate=OPTIMIZATION.rates.peak,
                weight_decay=OPTIMIZATION.weight_decay,
                max_grad_norm=OPTIMIZATION.gradient_clipping,
                optim="adamw_torch_fused",
                bf16=workload.precision == "bf16",
                use_cpu=device.type == "cpu",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[clock],
        )
        trainer.train()
    seconds, update = clock.marks.fastest()
    return Turn(step=seconds, update=update)


def make_model(workload: Workload) -> Any:
    """The random model, on the CPU."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**workload.model), dtype=torch.float32).train()
    drop_attention_mask(model, sequence_length=workload.sequence_length)
    return model


def make_batches(workload: Workload) -> list[Tensor]:
    """Tokens [sequences, sequence_length + 1] of every step, the same on all processes."""
    generator = torch.Generator().manual_seed(1)
    shape = (workload.sequences, workload.sequence_length + 1)
    steps = workload.warmup_steps + workload.timed_steps
    return [torch.randint(int(workload.model["vocab_size"]), shape, generator=generator) for _ in range(steps)]


def wait_for_all(processes: Processes, *, device: torch.device) -> None:
    """Until every process and every device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    processes.barrier()


def take_turn(
    sender: Connection, side: str, workload: Workload, rank: int, size: int, port: int, folder: Path | None
) -> None:
    """What a process of a turn runs; its `Turn` goes to `sender`."""
    on_gpu = torch.cuda.is_available()
    if size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    if not on_gpu:
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with silence(), Processes.start() as processes:
        device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
        if side == "trainer":
            turn = time_trainer(workload=workload, device=device, processes=processes)
        else:
            turn = time_steps(side, workload=workload, device=device, processes=processes, folder=folder)
        sender.send(turn)
        if dist.is_initialized() and size == 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without the libraries' notices, which they print to stdout: the last line is for the result."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield


def run_turn(side: str, *, context: Any, workload: Workload, size: int, with_checkpoint: bool) -> Turn:
    """One turn of a side on fresh processes; the slowest of them counts."""
    with tempfile.TemporaryDirectory() as temporary, socket.socket() as probe:
        folder = Path(temporary) / "checkpoints" if with_checkpoint else None
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        processes, receivers = [], []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            processes.append(
                context.Process(target=take_turn, args=(sender, side, workload, rank, size, port, folder), daemon=True)
            )
            processes[-1].start()
            sender.close()  # so that a process that dies is noticed
            receivers.append(receiver)
        try:
            turns: list[Turn] = [receiver.recv() for receiver in receivers]
        except EOFError:
            sys.exit(f"{side} on {size} processes ended without a result")
        for process in processes:
            process.join()
    return max(turns, key=lambda turn: turn.step)


def make_workload(*, quick: bool, on_gpu: bool) -> Workload:
    """Sizes that fit the machine."""
    if on_gpu:
        return Workload(
            model=SMOLLM2_135M,
            sequences=32,
            micro_batch_size=8,
            sequence_length=1024,
            precision="bf16",
            rounds=2 if quick else 5,
            checkpoint_rounds=2,
            warmup_steps=3,
            timed_steps=5 if quick else 20,
        )
    if quick:
        return Workload(
            model=QUICK,
            sequences=8,
            micro_batch_size=1,
            sequence_length=128,
            precision="fp32",
            rounds=2,
            checkpoint_rounds=1,
            warmup_steps=1,
            timed_steps=2,
        )
    return Workload(
        model=SMOLLM2_135M,
        sequences=16,
        micro_batch_size=4,
        sequence_length=64,
        precision="fp32",
        rounds=2,
        checkpoint_rounds=1,
        warmup_steps=1,
        timed_steps=1,
    )


def make_sides(sizes: list[int], *, on_gpu: bool) -> list[tuple[str, int]]:
    """Sides and on how many processes."""
    sides = [(side, size) for size in sizes for side in ("compute", "ddp", *ENGINES)]
    return sides + [("trainer", size) for size in sizes if on_gpu or size == 1]


def summarise(turns: dict[tuple[str, int], list[Turn]], *, workload: Workload) -> dict[str, Any]:
    """The figures of every side, and the ratios."""
    tokens = workload.sequences * workload.sequence_length

    fastest = {side: min(of_side, key=lambda turn: turn.step) for side, of_side in turns.items()}

    def ratio(of: tuple[str, int], to: tuple[str, int]) -> float:
        """How many times as fast."""
        return fastest[to].step / fastest[of].step

    figures = {}
    for (side, size), of_side in turns.items():
        checkpoints = [turn.checkpoint for turn in of_side if turn.checkpoint]
        figures[f"{side}-{size}"] = {
            "processes": size,
            "tokens_per_second": tokens / fastest[side, size].step,
            "spread": max(turn.step for turn in of_side) / fastest[side, size].step,
            "update_share": fastest[side, size].update / fastest[side, size].step,
            "overhead_share": 1 - ratio((side, size), ("compute", size)),
            "over_one_process": ratio((side, size), (side, 1)),
            "checkpoint": {key: statistics.median(each[key] for each in checkpoints) for key in checkpoints[0]}
            if checkpoints
            else None,
        }
    most = max(size for _, size in turns)
    most_of_trainer = max(size for side, size in turns if side == "trainer")
    return {
        "deepspeed_over_ddp": ratio(("zero1", most), ("ddp", most)),
        "torch_over_ddp": ratio(("torch", most), ("ddp", most)),
        "engine_over_trainer": ratio(("torch", most_of_trainer), ("trainer", most_of_trainer)),
        "configurations": figures,
    }


def print_table(figures: dict[str, dict[str, Any]]) -> None:
    """For people."""
    table = Table(title="engines", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in (
        "side",
        "n",
        "tokens/s",
        "of n = 1",
        "update",
        "overhead",
        "save",
        "verify",
        "load",
        "size",
    ):
        table.add_column(name, justify="left" if name == "side" else "right")
    for name, row in figures.items():
        checkpoint = row["checkpoint"]
        cells = ["", "", "", ""]
        if checkpoint:
            cells = [f"{checkpoint[f'{what}_seconds']:.2f} s" for what in ("save", "verify", "load")]
            cells.append(f"{checkpoint['bytes'] / 1e6:.0f} MB")
        table.add_row(
            name.rsplit("-", 1)[0],
            str(row["processes"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['over_one_process']:.2f}x",
            f"{row['update_share']:.1%}",
            f"{row['overhead_share']:.1%}",
            *cells,
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, about two minutes on 2 cores")
    parser.add_argument("--rounds", type=int, help="turns of each side")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    workload = make_workload(quick=arguments.quick, on_gpu=on_gpu)
    rounds = arguments.rounds or workload.rounds
    sizes = sorted({1, torch.cuda.device_count()}) if on_gpu else [1, 2]
    sides = make_sides(sizes, on_gpu=on_gpu)
    # Imported once, by the server that the processes of all turns are forks of; a fork cannot use a GPU that its
    # parent has looked at, and importing DeepSpeed is a look.
    context = multiprocessing.get_context("spawn" if on_gpu else "forkserver")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    context.set_forkserver_preload(
        [
            "deepspeed",
            "shearing.training.engines.deepspeed_engine",
            "transformers.trainer",
            LLAMA,
        ]
    )
    turns: dict[tuple[str, int], list[Turn]] = {side: [] for side in sides}
    for number in range(rounds):
        first = number * len(sides) // rounds
        for side, size in sides[first:] + sides[:first]:
            with_checkpoint = side in ENGINES and number < workload.checkpoint_rounds
            turn = run_turn(side, context=context, workload=workload, size=size, with_checkpoint=with_checkpoint)
            turns[side, size].append(turn)
            print(f"  round {number + 1}: {side} on {size}: {turn.step:.3f} s a step", flush=True)
    result: dict[str, Any] = {
        "benchmark": "scaling",
        "quick": arguments.quick,
        **summarise(turns, workload=workload),
        "workload": {**asdict(workload), "rounds": rounds},
        "environment": environment(torch.device("cuda" if on_gpu else "cpu")),
    }
    print_table(result["configurations"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
