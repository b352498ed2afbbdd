"""The evaluation stage on a tiny run: what it measures, and that an interrupted one continues."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import PreTrainedModel

from shearing.models.cutting import compact
from shearing.models.loading import load_source
from shearing.models.shape import Shape, resolve_target
from shearing.pruning.structured.importance.magnitude import Magnitude, magnitude_scores
from shearing.pruning.structured.importance.metric import Evidence, Scores
from shearing.pruning.structured.importance.registry import METRICS, MetricFacts
from shearing.pruning.structured.rounding import select
from shearing.runs.context import RunContext
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages import evaluate as stage
from shearing.runs.stages.evaluate import evaluate
from tests.conftest import tiny_recipe_data


@pytest.fixture
def recipe(tiny_inputs: Path, tmp_path: Path) -> Recipe:
    """A run that was cut where magnitude says, and trained on by a little."""
    data = tiny_recipe_data(tiny_inputs, run_dir=tmp_path / "run")
    data["evaluation"]["baselines"] = ["random", "magnitude", "activations"]
    recipe = Recipe.model_validate(data)
    directory = RunDirectory(recipe.run_dir)
    source = load_source(recipe.model.source)
    masks, selection = select(
        magnitude_scores(source),
        source=Shape.of(source.config),
        target=resolve_target(recipe.target, source=source.config),
    )
    model = compact(source, masks=masks, selection=selection)
    model.save_pretrained(directory.compact)
    directory.mark_complete("compact", {})
    torch.nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    model.save_pretrained(directory.model)
    directory.mark_complete("pretrain", {})
    return recipe


def quiet(recipe: Recipe) -> RunContext:
    return RunContext(recipe, console=Console(file=io.StringIO(), width=100))


def count_measurements(monkeypatch: pytest.MonkeyPatch, *, stop_after: int | None = None) -> list[None]:
    calls: list[None] = []
    original = stage.heldout_loss

    def counted(*arguments: Any, **keywords: Any) -> Any:
        if stop_after is not None and len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(None)
        return original(*arguments, **keywords)

    monkeypatch.setattr(stage, "heldout_loss", counted)
    return calls


def test_every_model_of_the_run_is_measured(recipe: Recipe) -> None:
    context = quiet(recipe)
    evaluation = evaluate(context)

    assert list(evaluation["models"]) == ["source", "random", "magnitude", "activations", "compact", "final"]
    assert json.loads(RunDirectory(recipe.run_dir).evaluation.read_text()) == evaluation
    shapes = [model["shape"] for name, model in evaluation["models"].items() if name != "source"]
    assert all(shape == shapes[0] for shape in shapes)
    assert shapes[0]["hidden_size"] == 16
    for model in evaluation["models"].values():
        assert list(model["domains"]) == ["digits", "letters"]
        assert all(figures["tokens"] == 64 for figures in model["domains"].values())
    assert evaluation["models"]["final"]["training_tokens"] == (6 + 4) * 2 * 16
    assert losses(evaluation)["magnitude"] == losses(evaluation)["compact"]
    assert losses(evaluation)["compact"] != losses(evaluation)["final"]
    assert "learned" in context.console.file.getvalue()  # type: ignore[attr-defined]
    assert not list(recipe.run_dir.glob("*partial*"))


def test_an_interrupted_evaluation_continues(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(quiet(recipe))
    RunDirectory(recipe.run_dir).evaluation.unlink()

    with monkeypatch.context() as patch:
        count_measurements(patch, stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            evaluate(quiet(recipe))
    assert not RunDirectory(recipe.run_dir).evaluation.exists()

    calls = count_measurements(monkeypatch)
    continued = evaluate(quiet(recipe))

    assert len(calls) == 3
    assert losses(continued) == losses(whole)


def test_nothing_is_measured_twice_until_a_setting_changes(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(quiet(recipe))
    calls = count_measurements(monkeypatch)

    evaluate(quiet(recipe))
    assert calls == []

    shorter = recipe.evaluation.model_copy(update={"tokens_per_domain": 32})
    evaluate(quiet(recipe.model_copy(update={"evaluation": shorter})))
    assert len(calls) == 6


def test_a_model_that_changed_is_measured_again(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(quiet(recipe))
    weights = RunDirectory(recipe.run_dir).model / "model.safetensors"
    weights.touch()
    calls = count_measurements(monkeypatch)

    evaluate(quiet(recipe))
    assert len(calls) == 1


def test_models_that_do_not_exist_yet_have_no_row(recipe: Recipe) -> None:
    directory = RunDirectory(recipe.run_dir)
    directory.complete("pretrain").unlink()
    assert list(evaluate(quiet(recipe))["models"])[-1] == "compact"

    directory.complete("compact").unlink()
    assert list(evaluate(quiet(recipe))["models"]) == ["source"]


def test_pretraining_adds_a_row_and_keeps_the_others(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(recipe.run_dir)
    directory.complete("pretrain").unlink()
    evaluate(quiet(recipe))
    directory.mark_complete("pretrain", {})
    calls = count_measurements(monkeypatch)

    assert "final" in evaluate(quiet(recipe))["models"]
    assert len(calls) == 1


def test_scores_that_graded_the_start_serve_the_baseline_of_their_name_alone(recipe: Recipe) -> None:
    evaluation = evaluate(quiet(recipe))
    scores = magnitude_scores(load_source(recipe.model.source))
    directory = RunDirectory(recipe.run_dir)
    directory.prune.mkdir()
    save_file(scores, directory.prune / "importance.safetensors")
    directory.evaluation.unlink()

    again = evaluate(quiet(recipe))

    assert losses(again)["activations"] == losses(evaluation)["activations"]


def test_speed_is_measured_on_source_and_result_only(recipe: Recipe) -> None:
    timed = recipe.evaluation.model_copy(update={"speed": True, "baselines": ["random"]})
    evaluation = evaluate(quiet(recipe.model_copy(update={"evaluation": timed})))

    assert [name for name, model in evaluation["models"].items() if model["speed"]] == ["source", "final"]
    assert evaluation["models"]["final"]["speed"]["decode_milliseconds"] > 0


def losses(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {name: model["domains"] for name, model in evaluation["models"].items()}


def test_a_metric_declared_here_and_registered_is_a_baseline(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = MetricFacts(home=f"{__name__}:HeldAgainstMagnitude", reads_text=True, title="smallest")
    monkeypatch.setitem(METRICS, "smallest", facts)
    settings = recipe.evaluation.model_copy(update={"baselines": ["magnitude", "smallest"]})
    models = evaluate(quiet(recipe.model_copy(update={"evaluation": settings})))["models"]

    assert list(models) == ["source", "magnitude", "smallest", "compact", "final"]
    assert models["smallest"]["shape"] == models["magnitude"]["shape"]
    assert models["smallest"]["domains"] != models["magnitude"]["domains"]


class HeldAgainstMagnitude(Magnitude):
    """The smallest units are the best."""

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        assert sum(batch.tokens.numel() for batch in evidence.text) == 64
        return {name: -values for name, values in super().scores(model, evidence=evidence, advance=advance).items()}
