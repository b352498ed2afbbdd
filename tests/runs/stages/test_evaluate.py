"""The evaluation stage on a tiny run: what it measures, and that an interrupted one continues."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import PreTrainedModel

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.writer import CorpusWriter
from shearing.errors import ShearingError
from shearing.evaluation.heldout import heldout_loss
from shearing.files.tensors import read_header
from shearing.models.cutting import compact
from shearing.models.loading import load_source
from shearing.models.shape import Shape, resolve_target
from shearing.pruning.structured.importance.magnitude import Magnitude, magnitude_scores
from shearing.pruning.structured.importance.metric import Evidence, Scores
from shearing.pruning.structured.importance.registry import METRICS, MetricFacts
from shearing.pruning.structured.refitting.linear import refit_cost
from shearing.pruning.structured.rounding import select
from shearing.runs.context import RunContext
from shearing.runs.planning.hardware import forward_flops_per_token, training_flops_per_token
from shearing.runs.planning.preflight import preflight
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages import evaluate as stage
from shearing.runs.stages.choices import START_SCORES, keep_scores
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
    directory.prune.mkdir(parents=True)
    kept = {name: mask.clone() for name, mask in masks.tensors().items()}
    save_file(kept, directory.prune / "masks.safetensors")
    learned(recipe, hidden=0)
    model = compact(source, masks=masks, selection=selection)
    model.save_pretrained(directory.compact)
    directory.mark_complete("compact", {})
    torch.nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    model.save_pretrained(directory.model)
    directory.mark_complete("pretrain", {})
    return recipe


def learned(recipe: Recipe, *, hidden: int | str) -> None:
    """Say that mask learning changed so many hidden dimensions."""
    summary = {"changed_from_start": {"layers": 0, "hidden": hidden}}
    (RunDirectory(recipe.run_dir).prune / "summary.json").write_text(json.dumps(summary))


def with_baselines(recipe: Recipe, *names: str) -> Recipe:
    evaluation = recipe.evaluation.model_copy(update={"baselines": list(names)})
    return recipe.model_copy(update={"evaluation": evaluation})


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
    printed = context.console.file.getvalue()  # type: ignore[attr-defined]
    assert "Mask learning changed none of the units chosen by reconstruction." in " ".join(printed.split())
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


def test_scores_that_graded_the_start_serve_the_baseline_of_the_metric_that_wrote_them(recipe: Recipe) -> None:
    context = quiet(with_baselines(recipe, "activations", "reconstruction"))
    target = resolve_target(recipe.target, source=context.config)
    first = evaluate(context)
    kept = magnitude_scores(load_source(recipe.model.source))

    def again() -> dict[str, Any]:
        context.directory.evaluation.unlink()
        return evaluate(context)

    keep_scores(context, kept, metric="activations", target=target)
    assert losses(again())["activations"] == losses(again())["compact"] != losses(first)["activations"]
    assert losses(again())["reconstruction"] == losses(first)["reconstruction"]
    keep_scores(context, kept, metric="activations", target=dataclasses.replace(target, intermediate_size=7))
    assert losses(again()) == losses(first)
    _, metadata = read_header(context.directory.prune / START_SCORES)
    assert metadata["metric"] == "activations"
    save_file(kept, context.directory.prune / START_SCORES)  # says nothing of where it is from
    assert losses(again()) == losses(first)


def test_a_row_says_what_its_model_kept_and_took(recipe: Recipe) -> None:
    context = quiet(with_baselines(recipe, "magnitude", "random", "activations", "activations+refit"))
    models = evaluate(context)["models"]

    assert models["source"]["units"] is None
    units = {name: model["units"] for name, model in models.items()}
    assert units["magnitude"] == units["compact"] == units["final"]
    assert units["activations"] == units["activations+refit"]
    assert len(set(units.values())) == 4
    assert losses({"models": models})["activations"] != losses({"models": models})["activations+refit"]
    assert [models[name]["label"] for name in ("random", "activations+refit")] == ["chance", "activations, refitted"]

    source, target = Shape.of(context.config), resolve_target(recipe.target, source=context.config)
    flops = {name: model["flops"] for name, model in models.items()}
    assert flops["source"] == flops["random"] == flops["magnitude"] == 0
    forward = forward_flops_per_token(source, sequence_length=16)
    text = 64  # tokens
    assert flops["activations"] == pytest.approx(text * forward, rel=1e-9)
    refit = refit_cost(source, target=target, text_tokens=text)
    assert flops["activations+refit"] == pytest.approx(3 * text * forward + refit.other_flops, rel=1e-9)
    pretrained = 4 * 2 * 16 * training_flops_per_token(target, sequence_length=16)
    assert flops["final"] - flops["compact"] == pytest.approx(pretrained, rel=1e-9)
    assert flops["compact"] > 6 * 2 * 16 * training_flops_per_token(source, sequence_length=16) + refit.other_flops


def test_a_refit_leaves_the_source_to_the_rows_after_it(recipe: Recipe) -> None:
    alone = evaluate(quiet(with_baselines(recipe, "magnitude")))
    RunDirectory(recipe.run_dir).evaluation.unlink()
    after = evaluate(quiet(with_baselines(recipe, "activations+refit", "magnitude")))
    assert losses(after)["magnitude"] == losses(alone)["magnitude"]


@pytest.mark.parametrize(
    ("changed", "prune", "label"),
    [
        (0, {}, "chosen by reconstruction, refitted, trained"),
        (0, {"compensate": False}, "chosen by reconstruction, trained"),
        (0, {"initial_masks": "magnitude"}, "chosen by weight magnitude, refitted, trained"),
        (3, {}, "learned masks, started by reconstruction"),
        ("open", {"initial_masks": "open"}, "learned masks, started open"),
    ],
)
def test_a_model_is_called_learned_where_learning_changed_units(
    recipe: Recipe, changed: int | str, prune: dict[str, Any], label: str
) -> None:
    learned(recipe, hidden=changed)
    stage = recipe.pruning.prune.model_copy(update=prune)
    models = evaluate(quiet(with_baselines(recipe).model_copy(update={"prune": stage})))["models"]
    assert [models[name]["label"] for name in ("compact", "final")] == [label, f"{label}, pretrained"]
    assert models["compact"]["changed_from_start"]["hidden"] == changed


def test_labels_follow_the_run_without_measuring_again(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(quiet(recipe))
    calls = count_measurements(monkeypatch)
    learned(recipe, hidden=2)
    assert evaluate(quiet(recipe))["models"]["compact"]["label"] == "learned masks, started by reconstruction"
    assert not calls


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


def outside_of(corpus: Path, output: Path, *, text: str = "aabb", trained_on: bool = False) -> Path:
    """A corpus by the tokenizer of another, whose one domain repeats the letters of `text`."""
    manifest = json.loads((corpus / "digits" / "manifest.json").read_text())
    known = Corpus.open(corpus).document_hashes("digits")[0]
    writer = CorpusWriter(
        output,
        vocab_size=20,
        separator_id=1,
        tokenizer="tiny",
        tokenizer_fingerprint=manifest["tokenizer_fingerprint"],
        validation_fraction=0.1,
        test_fraction=0.8,
    )
    letters = "abcdefgh"
    with writer.domain("pairs", sources=[], inputs=text) as domain:
        for i in range(40):
            domain.add(f"{text} {i}", token_ids=[2 + letters.index(letter) for letter in text] * (4 + i % 3))
    writer.finish()
    if trained_on:
        path = output / "pairs" / "test_hashes.npy"
        hashes = np.load(path)
        hashes[0] = known
        np.save(path, hashes)
        content = json.loads((output / "pairs" / "manifest.json").read_text())
        content["parts"]["test"]["hashes_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (output / "pairs" / "manifest.json").write_text(json.dumps(content))
    return output


def with_outside(recipe: Recipe, path: Path) -> Recipe:
    settings = recipe.evaluation.model_copy(update={"outside": path, "baselines": ["random"]})
    return recipe.model_copy(update={"evaluation": settings})


def test_text_of_no_training_domain_has_columns_and_a_mean_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    usual = evaluate(quiet(with_outside(recipe, None)))  # type: ignore[arg-type]
    context = quiet(with_outside(recipe, outside_of(recipe.data.corpus, tmp_path / "outside")))
    evaluation = evaluate(context)
    assert losses(evaluation) == losses(usual)
    direct = heldout_loss(
        load_source(recipe.model.source),
        Corpus.open(tmp_path / "outside"),
        split="test",
        tokens_per_domain=64,
        sequence_length=16,
        micro_batch_size=4,
    )["pairs"]
    source = evaluation["models"]["source"]
    assert list(source["outside"]) == ["pairs"]
    assert source["outside"]["pairs"]["loss"] == pytest.approx(direct.loss, rel=1e-6)
    assert source["outside_mean"]["loss"] == source["outside"]["pairs"]["loss"]
    assert source["mean"] == usual["models"]["source"]["mean"]
    assert evaluation["settings"]["outside"]["split"] == "test"
    assert usual["settings"]["outside"] is None
    assert "outside" not in usual["models"]["source"]
    printed = context.console.file.getvalue()  # type: ignore[attr-defined]
    assert "text of no training domain" in " ".join(printed.split())
    assert f"{source['outside']['pairs']['loss']:.3f}" in printed


def test_outside_text_that_is_trained_on_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    outside = outside_of(recipe.data.corpus, tmp_path / "outside", trained_on=True)
    with pytest.raises(ShearingError, match=r"1 training documents of domain digits are in it too"):
        preflight(quiet(with_outside(recipe, outside)))
    with pytest.raises(ShearingError, match=r"evaluation\.outside.*domain digits"):
        preflight(quiet(with_outside(recipe, recipe.data.corpus)))


def test_outside_text_of_another_tokenizer_or_none_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ShearingError, match=r"evaluation\.outside"):
        preflight(quiet(with_outside(recipe, tmp_path / "nowhere")))
    outside = outside_of(recipe.data.corpus, tmp_path / "outside")
    path = outside / "pairs" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_fingerprint": "0" * 32}))
    with pytest.raises(ShearingError, match=r"evaluation\.outside.*tokenised with tiny"):
        preflight(quiet(with_outside(recipe, outside)))
