"""The example's loop, on public names alone, gives what ours gives."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from shearing.models.shape import Shape
from shearing.pruning.structured.masking import Masking
from shearing.training.loop import train
from tests.repository import ROOT
from tests.training import tasks

EXAMPLE = ROOT / "examples" / "prune_in_your_own_loop.py"


def example() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("prune_in_your_own_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("estimator", ["hard_concrete", "straight_through"])
def test_a_loop_of_ones_own_ends_where_ours_does(tiny_inputs: Path, tmp_path: Path, estimator: str) -> None:
    settings = {"micro_batch_size": tasks.SEQUENCES, "gradient_clipping": 1.0, "weight_decay": 0.0}
    task = tasks.tiny_task(tiny_inputs, tmp_path, estimator=estimator, **settings)
    assert isinstance(task.masking, Masking)
    schedule = dataclasses.replace(task.schedule, micro_batch_size=tasks.SEQUENCES)
    masking = dataclasses.replace(task.masking, draws=1)
    train(dataclasses.replace(task, masking=masking, schedule=schedule), console=Console(file=io.StringIO()))
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()

    objective, own = tasks.masked_objective(tiny_inputs, estimator=estimator)
    own = dataclasses.replace(own, draws=1)
    mixture = tasks.mixture_of(tiny_inputs)
    optimizer = torch.optim.AdamW(
        objective.model.parameters(), lr=tasks.RATE, betas=tasks.BETAS, eps=tasks.EPSILON, weight_decay=0.0
    )
    batches = [
        mixture.batch(first_sample=step * tasks.SEQUENCES, num_sequences=tasks.SEQUENCES).tokens
        for step in range(tasks.STEPS)
    ]
    losses = example().learn(objective.model, own, optimizer=optimizer, batches=batches)

    ours = [line["loss"] for line in map(json.loads, lines) if "event" not in line]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(ours), rtol=0.0, atol=1e-5)
    weights = dict(objective.named_parameters())
    for name, weight in task.objective.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=0.0, atol=1e-5)
    learned, frozen = (masking.state_dict()[key] for key in ("log_alpha", "frozen"))
    for name, value in own.state_dict()["log_alpha"].items():
        torch.testing.assert_close(value, learned[name], rtol=0.0, atol=1e-5)
        assert torch.equal(own.state_dict()["frozen"][name], frozen[name])

    # The masks were left without noise: the cut computes the same.
    tokens_BT = batches[0]
    with torch.no_grad():
        before = objective.model.eval()(tokens_BT).logits
        small = own.cut()
        torch.testing.assert_close(small(tokens_BT).logits, before, rtol=0.0, atol=1e-5)
    assert Shape.of(small.config) == own.learner.target


def test_the_example_as_people_run_it(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example()
    recipe = module.TargetRecipe
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    monkeypatch.setattr(module, "TargetRecipe", lambda **_: recipe(**small))
    monkeypatch.setattr(module, "SEQUENCE_LENGTH", tasks.LENGTH)
    arguments = ["--model", tiny_inputs / "model", "--corpus", tiny_inputs / "corpus", "--output", tmp_path / "small"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
    module.main()
    said = capsys.readouterr().out
    assert "test loss: digits" in said
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "small").config
    assert (config.num_hidden_layers, config.hidden_size) == (2, 16)
    assert "rope_theta" in json.loads((tmp_path / "small" / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "small").encode("ab01")
