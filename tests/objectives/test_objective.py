"""Objectives: built by name, and free to listen to what no engine takes charge of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shearing.objectives.language_model import LanguageModelLoss
from shearing.objectives.objective import PARAMETER_PREFIX, Objective, Origins, objective_of
from shearing.objectives.registry import OBJECTIVES
from shearing.training.checkpoints.pieces import ShardedState
from shearing.training.engines.optimizer import Optimization
from shearing.training.engines.torch_engine import TorchEngine
from shearing.training.learning_rates import LearningRates
from shearing.training.recipe import StageRecipe
from tests.models.tiny import VOCAB_SIZE, tiny_model
from tests.objectives.distillations import parts_of

CPU = torch.device("cpu")


def test_the_list_of_names_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; "
        "from shearing.objectives.registry import OBJECTIVES; print(*OBJECTIVES)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == list(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_name_is_an_objective_of_its_model(name: str) -> None:
    parts = parts_of()
    objective = objective_of(name, parts=parts)
    assert isinstance(objective, Objective)
    own = {PARAMETER_PREFIX + name for name, _ in parts.model.named_parameters()}
    assert {name for name, _ in objective.named_parameters()} == own
    tokens_BT = torch.arange(10).view(2, 5) % VOCAB_SIZE
    origins = Origins(domains=torch.tensor([0, 1]))
    with torch.no_grad():
        expected = LanguageModelLoss(parts.model, chunk_tokens=8)(tokens_BT)
    for training in (True, False):
        losses = objective.train(training)(tokens_BT, None, origins if training else None)
        torch.testing.assert_close(losses.rows, expected.rows)
        assert losses.labels.tolist() == [4, 4]
        assert losses.measured.shape == (2, len(objective.measures))
        if not training or name == "language_model":
            assert losses.total.item() == pytest.approx(losses.rows.sum().item())


def test_a_teacher_is_no_part_of_what_an_engine_prepares_trains_and_saves(tmp_path: Path) -> None:
    parts = parts_of(teacher=(teacher := tiny_model(seed=1)), weight=0.5)
    objective = objective_of("distillation", parts=parts)
    stage = StageRecipe.model_validate({"duration": 4, "batch_size": 2, "learning_rate": 0.01, "warmup": 0})
    optimization = Optimization.of(stage, rates=LearningRates.of(stage, tokens_per_step=2))
    engine = TorchEngine(optimization, device=CPU, precision=torch.float32)
    prepared = engine.prepare(objective).train()
    tokens_BT = torch.arange(10).view(2, 5) % VOCAB_SIZE
    losses = prepared(tokens_BT, None, Origins(domains=torch.tensor([0, 1])))
    assert losses.total.item() != pytest.approx(losses.rows.sum().item(), abs=1e-2)
    engine.backward(losses.total, last=True)
    engine.step(step=0)
    engine.stage().write_into(tmp_path)
    own = {PARAMETER_PREFIX + name for name, _ in parts.model.named_parameters()}
    assert ShardedState(tmp_path).shapes.keys() == own
    for name, weight in tiny_model(seed=1).named_parameters():
        assert torch.equal(dict(teacher.named_parameters())[name], weight)
    prepared.eval()
    assert prepared(tokens_BT).total.item() == pytest.approx(prepared(tokens_BT).rows.sum().item())
