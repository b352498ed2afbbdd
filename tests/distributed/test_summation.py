"""Gradients of many micro-batches and several processes are added up in fp32, whatever precision they come in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shearing.objectives.language_model import LanguageModelLoss
from shearing.processes.processes import Processes
from shearing.training.checkpoints.pieces import MOMENTS, ShardedState
from tests.distributed.harness import spawn
from tests.models.tiny import VOCAB_SIZE, tiny_model
from tests.training.engines.test_kept_zeros import OPTIMIZATION, make_engine

pytestmark = pytest.mark.slow
PROCESSES, SEQUENCES, LENGTH = 2, 64, 9
UNCLIPPED = dataclasses.replace(OPTIMIZATION, gradient_clipping=0.0)


def _rows() -> Tensor:
    return torch.randint(VOCAB_SIZE, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(5))


def step(folder: Path, kind: str) -> None:
    """What every process runs: one step of many micro-batches, and a checkpoint."""
    with Processes.start(device="cpu") as processes:
        engine = make_engine(
            kind, processes=processes, precision=torch.bfloat16, optimization=UNCLIPPED, sequences=SEQUENCES
        )
        objective = engine.prepare(LanguageModelLoss(tiny_model("llama"), chunk_tokens=64))
        objective.train()
        micro_batches = _rows().tensor_split(processes.size)[processes.rank].split(1)
        for index, micro_batch in enumerate(micro_batches):
            with engine.autocast():
                loss = objective(micro_batch).total / (SEQUENCES * (LENGTH - 1))
            engine.backward(loss, last=index + 1 == len(micro_batches))
        assert not engine.step(step=0)
        engine.stage().write_into(folder)
        processes.barrier()


def _exact() -> dict[str, Tensor]:
    """The sum in fp64 of gradients that bf16 weights have of each micro-batch."""
    model = tiny_model("llama")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(torch.bfloat16)
    for name, buffer in buffers.items():
        module, _, own_name = name.rpartition(".")
        model.get_submodule(module).register_buffer(own_name, buffer, persistent=False)
    objective = LanguageModelLoss(model, chunk_tokens=64)
    sums = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in objective.named_parameters()}
    for row in _rows().split(1):
        (objective(row).total / (SEQUENCES * (LENGTH - 1))).backward()
        for name, weight in objective.named_parameters():
            assert weight.grad is not None
            sums[name] += weight.grad.double()
            weight.grad = None
    return sums


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3", "fsdp2"])
def test_many_micro_batches_add_up(kind: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    spawn(step, tmp_path / "checkpoint", kind, size=PROCESSES, folder=tmp_path / "out")
    found, expected = ShardedState(tmp_path / "checkpoint").whole(MOMENTS[0]), _exact()
    errors = {
        name: float((moment.double() / (1 - UNCLIPPED.betas[0]) - expected[name]).norm() / expected[name].norm())
        for name, moment in found
    }
    assert max(errors.values()) < 1e-4, errors
