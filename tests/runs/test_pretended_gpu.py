"""What runs do on a GPU, as far as it can be told without one (`tests/pretended_gpu.py`)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from shearing.files.durable import read_json
from shearing.models.masked import Masks
from shearing.runs.race.race import compare
from shearing.runs.race.rows import RaceSettings
from shearing.runs.recipe import Recipe
from shearing.runs.stages.run import run
from shearing.training import task
from tests.conftest import tiny_recipe_data
from tests.pretended_gpu import GPU, HOST, pretended_gpu


def test_mixes_and_waits_are_seen() -> None:
    host = torch.arange(6.0).view(2, 3)
    with pretended_gpu() as record:
        there = torch.nn.Linear(3, 2).to(GPU)
        sent = host.to(GPU)
        assert {each.device for each in (sent, there.weight, there(sent), sent[0], torch.zeros(2, device=GPU))} == {GPU}
        there(sent).sum().backward()
        assert there.weight.grad is not None
        assert {there.weight.grad.device, sent.new_ones(2).device} == {GPU}
        assert {each.device for each in (host, sent.to(HOST), there(sent).detach().cpu())} == {HOST}
        assert sent.sum() * host[0, 1] == sent[torch.tensor([0, 1])].sum()  # a number, and an index, of the host
        assert not record.mixes
        _ = sent * host
        Masks(hidden=sent[0]).to(HOST).tensors()["hidden"] + host[0]
    assert [re.sub(r", .*", "", mix) for mix in record.mixes] == ["mul of [(2"]
    # What a test reads itself is nobody's.
    assert [re.sub(r":\d+$", "", wait) for wait in record.waits] == ["shearing/models/masked.py"]


@pytest.mark.slow
def test_a_run_keeps_to_its_gpu_and_waits_for_it_where_it_says(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From mask learning, with a refit, to the baselines that are measured by default."""
    data = tiny_recipe_data(tiny_inputs, run_dir=tmp_path)
    del data["evaluation"]["baselines"]
    data["evaluation"]["generation"] = {"prompts": 0}
    data["training"]["log_interval"] = 4
    for stage in ("prune", "pretrain"):
        data[stage]["checkpoint_interval"] = data[stage]["duration"]
    before_step, after_step = task.Run.before_step, task.Run.after_step
    quiet: list[tuple[str, int]] = []

    with pretended_gpu() as record:

        def begin(self: task.Run) -> None:
            record.waits.clear()
            before_step(self)

        def end(self: task.Run, result: task.StepResult) -> None:
            after_step(self, result)
            quiet.extend([] if record.waits else [(self.task.name, self.step)])

        monkeypatch.setattr(task.Run, "before_step", begin)
        monkeypatch.setattr(task.Run, "after_step", end)
        run(Recipe.model_validate(data), console=Console(quiet=True))
    assert not record.mixes
    # Mask learning reads held-out losses behind its third step. Behind the fourth and the last of a stage metrics are.
    assert quiet == [("prune", 1), ("prune", 2), ("prune", 5), ("pretrain", 1), ("pretrain", 2), ("pretrain", 3)]


@pytest.mark.slow
def test_a_ranking_in_a_race_keeps_to_its_gpu(tiny_inputs: Path, tmp_path: Path) -> None:
    """Cut and trained, and with sizes of its own; refitted, and with means as biases."""
    data = {**tiny_recipe_data(tiny_inputs, run_dir=Path("unused")), "mixture": {"update": "constant"}}
    settings = RaceSettings(
        recipe=Recipe.model_validate(data), output=tmp_path, tokens=(64,), methods=("fluctuation",), equal=("tokens",)
    )
    with pretended_gpu() as record:
        compare(settings, console=Console(quiet=True))
    rows = [read_json(path) for path in (tmp_path / "rows").glob("*.json")]
    assert ["losses" in row for row in rows] == [True] * 4
    assert not record.mixes
