"""A gradient that is not finite on one process is a step that none of them does, whatever the engine.

And one of which a process holds nothing is a step that it does.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from shearing.objectives.language_model import LanguageModelLoss
from shearing.processes.processes import Processes
from shearing.training.adapters.spp import add_factors
from shearing.training.checkpoints.pieces import MOMENTS, WEIGHT, ShardedState
from tests.distributed.harness import spawn
from tests.models.tiny import tiny_ids, tiny_model
from tests.training.engines.test_kept_zeros import LENGTH, SEQUENCES, make_engine

PROCESSES = 2
Case = tuple[str, torch.dtype, float]
CASES: list[Case] = [
    ("torch", torch.float32, math.nan),
    ("fsdp2", torch.float32, math.nan),
    ("zero0", torch.float32, math.nan),
    ("zero1", torch.float32, math.nan),
    ("zero2", torch.float32, math.inf),
    ("zero3", torch.float32, math.nan),
    ("zero1", torch.bfloat16, math.nan),
    ("zero2", torch.bfloat16, math.nan),
    ("zero3", torch.bfloat16, math.inf),
]


def poison(folder: Path, cases: Sequence[Case]) -> None:
    """What every process runs: of each engine three steps; in the second the last process's first loss is no number."""
    with Processes.start(device="cpu") as processes:
        for kind, precision, bad in cases:
            case = f"{kind} {precision}"
            engine = make_engine(kind, processes=processes, precision=precision)
            objective = engine.prepare(LanguageModelLoss(tiny_model(num_hidden_layers=1), chunk_tokens=64))
            objective.train()
            own = tiny_ids(sequences=SEQUENCES, length=LENGTH).tensor_split(processes.size)[processes.rank].split(1)
            states: list[dict[str, bytes]] = []
            losses: list[list[float]] = []
            for step in range(3):
                losses.append([])
                for index, micro_batch in enumerate(own):
                    with engine.autocast():
                        loss = objective(micro_batch).total / (SEQUENCES * (LENGTH - 1))
                    losses[step].append(float(loss.detach()))
                    poisoned = step == 1 and processes.rank == processes.size - 1 and index == 0
                    engine.backward(loss * bad if poisoned else loss, last=index + 1 == len(own))
                assert bool(engine.step(step=step)) == (step == 1), f"{case}: step {step}"
                place = folder / case / str(step)
                place.mkdir(parents=True, exist_ok=True)
                engine.stage().write_into(place)
                processes.barrier()
                states.append({path.name: path.read_bytes() for path in place.iterdir()})
            assert states[0] == states[1], case
            assert losses[0] != losses[1] == losses[2], case  # nor has what forward passes use changed
            assert states[1] != states[2], case
            for values in (WEIGHT, *MOMENTS):
                assert all(tensor.isfinite().all() for _, tensor in ShardedState(place).whole(values)), case
            engine.close()


@pytest.mark.slow
def test_no_process_does_a_step_that_is_not_finite_on_one(tmp_path: Path) -> None:
    there = importlib.util.find_spec("deepspeed") is not None
    cases = [case for case in CASES if there or not case[0].startswith("zero")]
    spawn(poison, tmp_path / "states", cases, size=PROCESSES, folder=tmp_path / "out")


def train_one_row(folder: Path) -> None:
    """What every process runs: under FSDP2 the last process has no row of what alone is trained."""
    with Processes.start(device="cpu") as processes:
        model = tiny_model(num_hidden_layers=1)
        add_factors(model, rank=1, targets=["q_proj"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("spp_inputs"))
        engine = make_engine("fsdp2", processes=processes, precision=torch.float32)
        objective = engine.prepare(LanguageModelLoss(model, chunk_tokens=64))
        objective.train()
        own = tiny_ids(sequences=SEQUENCES, length=LENGTH).tensor_split(processes.size)[processes.rank]
        for step in range(2):
            engine.backward(objective(own).total / (SEQUENCES * (LENGTH - 1)), last=True)
            assert not bool(engine.step(step=step))
        engine.stage().write_into(folder)
        processes.barrier()
        assert ShardedState(folder).step == 2
        engine.close()


@pytest.mark.slow
def test_a_process_without_a_row_of_what_is_trained_counts_steps_as_the_others(tmp_path: Path) -> None:
    (tmp_path / "states").mkdir()
    spawn(train_one_row, tmp_path / "states", size=PROCESSES, folder=tmp_path / "out")
