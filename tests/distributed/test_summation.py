"""Gradients of many micro-batches and several processes are added up in fp32, whatever precision they come in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shearing.objectives.language_model import LanguageModelLoss
from shearing.processes.processes import Processes
from shearing.training.checkpoints.pieces import MOMENTS, ShardedState
from shearing.training.engines import gradient_sum
from shearing.training.engines.gradient_sum import GradientSum
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


def sum_in_buckets() -> None:
    """What every process runs: two steps of two micro-batches each, of parameters that fill three buckets."""
    gradient_sum._BUCKET_ELEMENTS = 20
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    unreached = nn.Parameter(torch.ones(4))
    parameters = [*model[:4].parameters(), unreached, *model[4].parameters()]
    with Processes.start(device="cpu") as processes:
        sums = GradientSum(parameters)
        for _ in range(2):
            parts = torch.randn(2 * processes.size, 8, 6)
            losses = [model(part).square().sum() for part in parts]
            expected = [
                torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True) for loss in losses
            ]
            for index, part in enumerate(parts[2 * processes.rank :][:2]):
                sums.armed = index == 1
                model(part).square().sum().backward()
            # In the order in which they are reached; the one in the middle waits for what no loss depends on.
            assert [bucket.work is not None for bucket in sums._buckets] == [True, False, True]
            sums.finish()
            for parameter, *gradients in zip(parameters, *expected, strict=True):
                torch.testing.assert_close(parameter.grad, torch.stack(gradients).sum(0))
                parameter.grad = None
        sums.close()


def test_buckets_travel_while_others_are_still_computed(tmp_path: Path) -> None:
    spawn(sum_in_buckets, size=PROCESSES, folder=tmp_path)
