"""A teacher stays whole and as it was on every process, and what is learned from it does not depend on their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shearing.objectives.distillation import Distillation
from shearing.objectives.objective import PARAMETER_PREFIX, Origins
from shearing.processes.processes import Processes
from shearing.runs.recipe import Recipe
from shearing.training.checkpoints.pieces import ShardedState
from tests.distributed import runs
from tests.distributed.conftest import Once
from tests.distributed.harness import spawn
from tests.models.tiny import VOCAB_SIZE, tiny_model
from tests.objectives.distillations import parts_of
from tests.training.engines.test_kept_zeros import SEQUENCES, make_engine

STEPS = 2


def train(folder: Path, kind: str) -> None:
    """What every process runs."""
    with Processes.start(device="cpu") as processes:
        teacher = tiny_model(seed=1)
        objective = Distillation.of(parts_of(teacher=teacher))
        own = {PARAMETER_PREFIX + name for name, _ in objective.model.named_parameters()}
        engine = make_engine(kind, processes=processes, precision=torch.float32)
        prepared = engine.prepare(objective)
        prepared.train()
        tokens_BT = torch.arange(SEQUENCES * 5).view(SEQUENCES, 5) % VOCAB_SIZE
        micro_batches = tokens_BT.tensor_split(processes.size)[processes.rank].split(1)
        for step in range(STEPS):
            for index, micro_BT in enumerate(micro_batches):
                losses = prepared(micro_BT, None, Origins(domains=torch.zeros(1, dtype=torch.int64)))
                with torch.no_grad():
                    logits = tiny_model(seed=1)(micro_BT[:, :-1]).logits.log_softmax(-1)
                of_teacher = -logits.gather(2, micro_BT[:, 1:, None]).sum()
                torch.testing.assert_close(losses.measured[0, 0], of_teacher, rtol=1e-5, atol=1e-5)
                engine.backward(losses.total / tokens_BT.numel(), last=index + 1 == len(micro_batches))
            assert not engine.step(step=step)
        for found, weight in zip(teacher.parameters(), tiny_model(seed=1).parameters(), strict=True):
            assert torch.equal(found, weight)
        engine.stage().write_into(folder)
        processes.barrier()
        assert ShardedState(folder).shapes.keys() == own


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "zero2", "zero3", "fsdp2"])
def test_a_teacher_is_not_shared_out(kind: str, tmp_path: Path) -> None:
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    (tmp_path / "checkpoint").mkdir()
    spawn(train, tmp_path / "checkpoint", kind, size=2, folder=tmp_path / "out")


def _recipe(inputs: Path, run_dir: Path, **training: Any) -> Recipe:
    return runs.recipe(inputs, run_dir=run_dir, steps=8, listening=True, **training)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "training"),
    [
        (2, {}),
        (4, {}),
        (2, {"engine": "deepspeed", "zero_stage": 1}),
        (2, {"engine": "deepspeed", "zero_stage": 2}),
        (2, {"engine": "deepspeed", "zero_stage": 3}),
        (2, {"engine": "fsdp2"}),
    ],
)
def test_several_processes_learn_what_one_does(
    size: int, training: dict[str, Any], tiny_inputs: Path, tmp_path: Path, once: Once
) -> None:
    if training.get("engine") == "deepspeed":
        pytest.importorskip("deepspeed")
    alone = once(lambda run_dir: _recipe(tiny_inputs, run_dir), ("prune",))
    recipe = _recipe(tiny_inputs, tmp_path / "run", **training)
    spawn(runs.train, recipe, ("prune",), size=size, folder=tmp_path / "out")
    found = []
    for run_dir in (alone, tmp_path / "run"):
        names = ("loss", "domain_losses", "domain_teacher_losses", "domain_divergences", "domain_teacher_weights")
        names = (*names, "domain_hidden_errors", "losses", "reference", "weights")
        lines = runs.lines(run_dir, "prune")
        found.append([{name: line[name] for name in names if name in line} for line in lines])
    assert runs.difference(*found) < 1e-3
    assert len({str(line.get("domain_teacher_weights")) for line in found[0]}) > 2
