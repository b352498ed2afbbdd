"""What the rule of the domain weights remembers is part of the run: it is continued and handed to the next stage."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shearing.data.mixture.online import MINIMUM_OBSERVATIONS
from shearing.models.loading import load_config
from shearing.models.shape import Shape, resolve_target
from shearing.runs.context import RunContext
from shearing.runs.recipe import Recipe
from shearing.runs.stages.compact import compact
from shearing.runs.stages.pretrain import pretrain
from shearing.runs.stages.prune import prune
from shearing.training.callbacks import save_checkpoints
from shearing.training.callbacks.stop_requests import StopRequests
from shearing.training.checkpoints.state import read_state, write_state
from shearing.training.stage import Interrupted
from shearing.training.task import Run, StepResult
from tests.conftest import tiny_recipe_data
from tests.training import tasks

STEPS = 14


def _recipe(inputs: Path, run_dir: Path, *, estimator: str = "straight_through", **mixture: Any) -> Recipe:
    data = tiny_recipe_data(inputs, run_dir=run_dir)
    data["prune"] |= {
        "estimator": estimator,
        "duration": f"{STEPS} steps",
        "sparsity_warmup": "6 steps",
        "freeze": "6 steps",
        "checkpoint_interval": "4 steps",
    }
    data["pretrain"] |= {"duration": f"{STEPS} steps"}
    data["mixture"] |= {"interval": "1 steps", "pretrain_interval": "1 steps", "reference": "online", **mixture}
    return Recipe.model_validate(data)


def _updates(run_dir: Path, stage: str = "prune") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line.get("event") == "mixture"]
    return [{key: line[key] for key in ("losses", "reference", "weights")} for line in updates]


def _on_the_way(source: Shape, target: Shape, *, share: float) -> int:
    """Parameters of a model with each size that far from the source's to the target's."""

    def size(name: str) -> int:
        before, after = getattr(source, name), getattr(target, name)
        return max(1, round(before + (after - before) * share))

    groups = size("num_key_value_heads")
    return dataclasses.replace(
        source,
        num_hidden_layers=size("num_hidden_layers"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_key_value_heads=groups,
        num_attention_heads=groups * size("query_heads_per_group"),
    ).num_parameters()


def _quiet(recipe: Recipe) -> RunContext:
    return RunContext(recipe, console=Console(file=io.StringIO()))


def _whole_and_parts(
    inputs: Path, folder: Path, *, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[Recipe, dict[str, Any]]:
    """A run, and the state it ends with; one that is stopped and continued has the same."""
    whole, parts = (_recipe(inputs, folder / name, **settings) for name in ("whole", "parts"))
    prune(_quiet(whole))
    with monkeypatch.context() as patch:
        tasks.stop_at(9, patch=patch)
        with pytest.raises(Interrupted):
            prune(_quiet(parts))
    prune(_quiet(parts))
    assert _updates(parts.run_dir) == _updates(whole.run_dir)
    ends = [each.run_dir / "prune" / "checkpoints" / f"step-{STEPS:08d}" for each in (whole, parts)]
    states = [read_state(end, "state") for end in ends]
    for name in ("mixture_rule", "averages"):
        assert states[0][name] == states[1][name]
    return whole, states[0]


def test_a_rule_that_remembers_goes_on_where_it_was(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, state = _whole_and_parts(tiny_inputs, tmp_path, monkeypatch=monkeypatch, update="robust")
    updates = _updates(whole.run_dir)
    source = updates[0]["reference"]
    assert [update["reference"] == source for update in updates] == [
        number < MINIMUM_OBSERVATIONS for number in range(1, len(updates) + 1)
    ]
    kept = state["mixture_rule"]
    sizes = [observation["parameters"] for observation in kept["observations"]]
    config = load_config(whole.model.source)
    source_shape, target_shape = Shape.of(config), resolve_target(whole.target, source=config)
    target = target_shape.num_parameters()
    # Losses go with the size they were measured at: whole units, on the way from the source to the target.
    assert sizes == [
        _on_the_way(source_shape, target_shape, share=min(1.0, observation["tokens"] / tokens_of_ramp))
        for tokens_of_ramp in [6 * kept["observations"][0]["tokens"]]
        for observation in kept["observations"]
    ]
    assert sizes[0] > sizes[-1] == target

    for stage in (compact, pretrain):
        stage(_quiet(whole))
    after = _updates(whole.run_dir, "pretrain")
    # The observations begin anew, what the rule remembers does not.
    assert [update["reference"] == source for update in after[:MINIMUM_OBSERVATIONS]] == [True] * 5 + [False]
    checkpoints = whole.run_dir / "pretrain" / "checkpoints"
    later = read_state(checkpoints / f"step-{STEPS:08d}", "state")["mixture_rule"]
    assert {observation["parameters"] for observation in later["observations"]} == {target}
    memory = dict(kept["memory"])
    for update in after:
        memory = {name: (1.0 - 0.1) * memory[name] + 0.1 * update["losses"][name] for name in memory}
    assert later["memory"] == pytest.approx(memory, rel=1e-12)


def test_training_losses_go_with_the_size_they_were_trained_at(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that noisy masks leave on average, not that of the binary masks that held-out text would be read with."""
    trained: dict[int, float] = {}
    settled: dict[int, int] = {}
    after_step = StopRequests.after_step

    def noted(requests: StopRequests, run: Run, result: StepResult) -> None:
        assert run.task.masking is not None
        trained[run.tokens] = run.task.masking.expected_parameters(step=run.step)
        settled[run.tokens] = run.task.masking.settled_parameters(step=run.step)
        after_step(requests, run, result)

    monkeypatch.setattr(StopRequests, "after_step", noted)
    settings = {"estimator": "hard_concrete", "losses": "training", "ema": 0.5}
    whole, state = _whole_and_parts(tiny_inputs, tmp_path, monkeypatch=monkeypatch, **settings)
    observations = state["mixture_rule"]["observations"]
    assert len(observations) == len(_updates(whole.run_dir)) > MINIMUM_OBSERVATIONS
    for observation in observations:
        assert observation["parameters"] == trained[observation["tokens"]]
    assert len({tokens for tokens in trained if trained[tokens] != settled[tokens]}) >= MINIMUM_OBSERVATIONS
    assert state["averages"].keys() == observations[-1]["losses"].keys() == {"digits", "letters"}


def test_checkpoints_from_before_rules_remembered_are_read(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(tiny_inputs, tmp_path / "run", reference="source")

    def without(folder: Path, name: str, state: dict[str, Any]) -> None:
        write_state(folder, name, {key: value for key, value in state.items() if key != "mixture_rule"})

    with monkeypatch.context() as patch:
        patch.setattr(save_checkpoints, "write_state", without)
        tasks.stop_at(5, patch=patch)
        with pytest.raises(Interrupted):
            prune(_quiet(recipe))
    prune(_quiet(recipe))
    whole = _recipe(tiny_inputs, tmp_path / "whole", reference="source")
    prune(_quiet(whole))
    assert _updates(recipe.run_dir) == _updates(whole.run_dir)
