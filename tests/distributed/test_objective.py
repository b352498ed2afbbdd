"""A teacher stays whole and as it was on every process, whatever of its student is shared out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shearing.objectives.language_model import LanguageModelLoss
from shearing.objectives.objective import PARAMETER_PREFIX
from shearing.processes.processes import Processes
from shearing.training.checkpoints.pieces import ShardedState
from tests.distributed.harness import spawn
from tests.models.tiny import VOCAB_SIZE, tiny_model
from tests.objectives.teacher import TeachersLoss
from tests.training.engines.test_kept_zeros import SEQUENCES, make_engine

STEPS = 2


def train(folder: Path, kind: str) -> None:
    """What every process runs."""
    with Processes.start(device="cpu") as processes:
        objective = TeachersLoss(tiny_model(), teacher=tiny_model(seed=1))
        own = {PARAMETER_PREFIX + name for name, _ in objective.model.named_parameters()}
        engine = make_engine(kind, processes=processes, precision=torch.float32)
        prepared = engine.prepare(objective)
        prepared.train()
        teacher = tiny_model(seed=1)
        tokens_BT = torch.arange(SEQUENCES * 5).view(SEQUENCES, 5) % VOCAB_SIZE
        micro_batches = tokens_BT.tensor_split(processes.size)[processes.rank].split(1)
        for step in range(STEPS):
            for index, micro_BT in enumerate(micro_batches):
                losses = prepared(micro_BT)
                with torch.no_grad():
                    of_teacher = LanguageModelLoss(teacher, chunk_tokens=8)(micro_BT).total
                torch.testing.assert_close(losses.total.detach(), losses.rows.sum() - of_teacher, rtol=1e-5, atol=1e-5)
                engine.backward(losses.total / tokens_BT.numel(), last=index + 1 == len(micro_batches))
            assert not engine.step(step=step)
        for found, weight in zip(objective.teacher.parameters(), teacher.parameters(), strict=True):
            assert torch.equal(found, weight)
        engine.save(folder)
        processes.barrier()
        assert ShardedState(folder).shapes.keys() == own


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "zero2", "zero3"])
def test_a_teacher_is_not_shared_out(kind: str, tmp_path: Path) -> None:
    if kind != "torch":
        pytest.importorskip("deepspeed")
    (tmp_path / "checkpoint").mkdir()
    spawn(train, tmp_path / "checkpoint", kind, size=2, folder=tmp_path / "out")
