"""Races: fair rows, shared work, failures that do not stop the others, kills that leave no trace."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from shearing.data.mixture.sampler import Batch, Mixture
from shearing.errors import ShearingError
from shearing.files.durable import read_json, write_json
from shearing.models.shape import Shape
from shearing.models.stored.spellings import in_both_spellings
from shearing.pruning.structured.importance.chance import Chance
from shearing.pruning.structured.importance.metric import Cost, Evidence, Scores
from shearing.pruning.structured.importance.registry import METRICS, MetricFacts
from shearing.runs.context import RunContext
from shearing.runs.planning.hardware import forward_flops_per_token
from shearing.runs.race import race as racing, running
from shearing.runs.race.methods import METHODS, RaceMethod, Ranking
from shearing.runs.race.plan import plan
from shearing.runs.race.race import compare
from shearing.runs.race.records import model_fingerprint
from shearing.runs.race.rows import RaceSettings
from shearing.runs.recipe import Recipe
from shearing.training.engines import optimizer, torch_engine
from tests.conftest import tiny_recipe_data
from tests.forks import start_shear
from tests.runs.stages.test_evaluate import outside_of

TOKENS_PER_STEP = 32
SECONDS = 240.0
DEPTH = frozenset({"layers", "attention", "mlp"})


def _recipe(inputs: Path, **sections: Any) -> Recipe:
    data = tiny_recipe_data(inputs, run_dir=Path("unused"))
    data["mixture"] = {"update": "constant"}
    for name, values in sections.items():
        data[name] = {**data[name], **values}
    return Recipe.model_validate(data)


def _settings(inputs: Path, output: Path, *, recipe: Recipe | None = None, **asked: Any) -> RaceSettings:
    chosen = {"tokens": (10 * TOKENS_PER_STEP,), "methods": ("start", "learned"), "equal": ("tokens",), **asked}
    return RaceSettings(recipe=recipe or _recipe(inputs), output=output, **chosen)


def _race(settings: RaceSettings) -> dict[str, Any]:
    return compare(settings, console=Console(quiet=True))


def _rows(output: Path) -> dict[str, dict[str, Any]]:
    """The rows' files, without what depends on the machine's speed."""
    rows = {path.stem: read_json(path) for path in sorted((output / "rows").glob("*.json"))}
    for row in rows.values():
        row.pop("seconds", None)
    return rows


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The learning rates that steps really had and the tokens that were really dealt, in order."""
    found: dict[str, list[Any]] = {"rates": [], "samples": []}
    set_rate, batch_of = optimizer.set_learning_rate, Mixture.batch

    def set_learning_rate(of: torch.optim.Optimizer, rate: float) -> None:
        found["rates"].append(rate)
        set_rate(of, rate)

    def batch(self: Mixture, **keywords: Any) -> Batch:
        result = batch_of(self, **keywords)
        found["samples"].append((keywords["first_sample"], result.tokens.tolist()))
        return result

    monkeypatch.setattr(torch_engine, "set_learning_rate", set_learning_rate)
    monkeypatch.setattr(Mixture, "batch", batch)
    return found


def test_all_rows_see_the_same_samples_at_the_same_rates(
    tiny_inputs: Path, tmp_path: Path, recorded: dict[str, list[Any]]
) -> None:
    seen = {}
    for method in ("random", "scratch", "start", "learned", "paper", "gradual"):
        for of_method in recorded.values():
            of_method.clear()
        _race(_settings(tiny_inputs, tmp_path / method, methods=(method,), refit="without"))
        # What is dealt ahead of the end of a stage is read by no step, and dealt again after the cut.
        of_steps = dict(recorded["samples"])
        seen[method] = recorded["rates"][:], [of_steps[2 * step] for step in range(10)]
        (row,) = _rows(tmp_path / method).values()
        assert row["tokens"] == 10 * TOKENS_PER_STEP
    rates, samples = seen["random"]
    assert rates == pytest.approx(_cosine(peak=1e-3, steps=10, final=0.1))
    for method, (of_method, read) in seen.items():
        assert of_method == rates, method
        assert read == samples, method


def _cosine(*, peak: float, steps: int, final: float) -> list[float]:
    return list(peak * (final + (1 - final) * (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2))


def test_frozen_masks_train_like_what_is_cut_at_once(tiny_inputs: Path, tmp_path: Path) -> None:
    """The same units with the same refit: moments that are carried and one schedule make the cut invisible."""
    _race(_settings(tiny_inputs, tmp_path, methods=("start", "reconstruction")))
    rows = _rows(tmp_path)
    for form in ("", "-refitted"):
        start, ranked = rows[f"start{form}-seed0-10steps"], rows[f"reconstruction{form}-seed0-10steps"]
        assert start["units"] == ranked["units"] is not None
        assert start["losses"]["final"]["mean"] == pytest.approx(ranked["losses"]["final"]["mean"], abs=2e-5)
        # The start is cut after six steps, so its loss after cutting is another.
        assert start["losses"]["after_cutting"]["mean"] != pytest.approx(ranked["losses"]["after_cutting"]["mean"])
    assert rows["start-seed0-10steps"]["losses"] != rows["start-refitted-seed0-10steps"]["losses"]


class _Counted(Chance):
    """Chance that remembers how often it was asked."""

    seeds: ClassVar[list[int]] = []

    def scores(self, model: Any, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None) -> Scores:
        self.seeds.append(evidence.seed)
        return super().scores(model, evidence=evidence, advance=advance)


class _NotANumber(Chance):
    def scores(self, model: Any, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None) -> Scores:
        return {name: values * float("nan") for name, values in super().scores(model, evidence=evidence).items()}


class _Raises(Chance):
    def scores(self, model: Any, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None) -> Scores:
        raise RuntimeError("no such luck\nsecond line")


class _Dear(Chance):
    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        return Cost(other_flops=1e30)


class _OtherFamily(Chance):
    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        raise ShearingError("source (architecture)", value="llama", allowed="another family", mend="choose another")


def _add(monkeypatch: pytest.MonkeyPatch, name: str, metric: type, **facts: Any) -> None:
    line = MetricFacts(home=f"{metric.__module__}:{metric.__name__}", title=name, reads_text=False, **facts)
    monkeypatch.setitem(METRICS, name, line)
    monkeypatch.setitem(METHODS, name, RaceMethod(title=name, how=Ranking(metric=name)))


def test_scores_are_measured_once_for_all_rows_of_a_seed(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add(monkeypatch, "counted", _Counted)
    _Counted.seeds.clear()
    _race(_settings(tiny_inputs, tmp_path, methods=("counted",), seeds=(0, 3), equal=("tokens", "flops")))
    assert _Counted.seeds == [0, 3]
    assert len([name for name in _rows(tmp_path) if name.startswith("counted")]) == 2 * 2 * 2
    # Nothing is left of what rows needed on their way.
    left = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert left == {"race.json", "results.json", "results.md", "results.svg", "rows", "scores"}


def test_a_row_that_fails_says_why_and_the_race_goes_on(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add(monkeypatch, "unlucky", _Raises)
    _add(monkeypatch, "nothing", _NotANumber)
    results = _race(_settings(tiny_inputs, tmp_path, methods=("unlucky", "nothing", "start"), refit="with"))
    rows = _rows(tmp_path)
    assert rows["unlucky-refitted-seed0-10steps"]["failed"] == "no such luck"
    assert "are NaN" in rows["nothing-refitted-seed0-10steps"]["failed"]
    assert rows["start-refitted-seed0-10steps"]["losses"]["final"]["mean"] > 0
    (budget,) = results["budgets"]
    table = {row["name"]: row for row in budget["equal_tokens"]["rows"]}
    assert table["unlucky-refitted"]["failed"] == {0: "no such luck"}
    assert "unlucky, refitted (failed: no such luck)" in (tmp_path / "results.md").read_text()
    # Kept as it is, until it is asked for again.
    _add(monkeypatch, "unlucky", Chance)
    _race(_settings(tiny_inputs, tmp_path, methods=("unlucky",), refit="with"))
    assert "failed" in _rows(tmp_path)["unlucky-refitted-seed0-10steps"]
    _race(_settings(tiny_inputs, tmp_path, methods=("unlucky",), refit="with", retry_failed=True))
    assert "failed" not in _rows(tmp_path)["unlucky-refitted-seed0-10steps"]


def test_training_that_diverges_is_a_failed_row(tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = _recipe(tiny_inputs, pretrain={"learning_rate": 1e30}, training={"max_skipped_steps": 1})
    _race(_settings(tiny_inputs, tmp_path, recipe=recipe, methods=("random", "start"), refit="without"))
    rows = _rows(tmp_path)
    assert len(rows) == 2
    assert all("failed" in row for row in rows.values())


def test_a_method_whose_choosing_takes_the_whole_budget_has_no_row_at_equal_flops(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add(monkeypatch, "dear", _Dear)
    settings = _settings(tiny_inputs, tmp_path, methods=("dear", "start"), refit="with", equal=("tokens", "flops"))
    (budget,) = _race(settings)["budgets"]
    dear, start = budget["equal_flops"]["rows"]
    assert dear["steps"] is None
    assert not dear["seeds"]
    # The budget is what the start takes, so its row is the one at equal tokens.
    assert start["steps"] == 10
    assert budget["equal_tokens"]["rows"][0]["seeds"] == [0]
    assert len(_rows(tmp_path)) == 2


def test_what_a_method_leaves_out_is_chosen_by_another(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add(monkeypatch, "depth", Chance, gives=DEPTH)
    _add(monkeypatch, "apart", Chance, gives=DEPTH - {"layers"})
    _race(_settings(tiny_inputs, tmp_path, methods=("depth", "apart", "random"), refit="without", rest_by="random"))
    rows = _rows(tmp_path)
    depth = rows["depth-rest-by-random-seed0-10steps"]
    assert depth["title"] == "layers by depth, rest by chance"
    # The same chance, taken from two places.
    assert depth["units"] == rows["random-seed0-10steps"]["units"]
    assert "final" in rows["apart-rest-by-random-seed0-10steps"]["losses"]


def test_sizes_by_layer_are_evaluated_and_not_trained(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add(monkeypatch, "across", Chance, across_layers="chance is chance everywhere")
    results = _race(_settings(tiny_inputs, tmp_path, methods=("across",)))
    rows = _rows(tmp_path)
    for form in ("", "-refitted"):
        own = rows[f"across-own-sizes{form}-seed0-0steps"]
        uniform = rows[f"across{form}-seed0-10steps"]
        assert "final" not in own["losses"]
        # To less than one unit of an MLP: three rows of hidden size.
        assert 0 <= uniform["parameters"] - own["parameters"] < 3 * 16
        assert own["losses"]["after_cutting"]["mean"] > 0
        assert own["flops"]["training"] == 0
    forms = {form["name"]: form for form in results["own_forms"]}
    assert forms["across-own-sizes"]["minus_uniform"]["seeds"] == [0]
    assert "across, sizes by layer, refitted" in (tmp_path / "results.md").read_text()


def test_the_own_form_of_fluctuation_has_means_as_biases(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for folds in (True, False):
        monkeypatch.setitem(METRICS, "fluctuation", replace(METRICS["fluctuation"], folds_means=folds))
        output = tmp_path / str(folds)
        _race(_settings(tiny_inputs, output, methods=("fluctuation",), refit="without"))
        rows = _rows(output)
        [own] = [row for name, row in rows.items() if "own-sizes" in name]
        assert ("means as biases" in own["title"]) == folds
        losses.append(own["losses"]["after_cutting"]["mean"])
    assert losses[0] != losses[1]


def test_text_of_no_domain_judges_too(tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = _recipe(tiny_inputs)
    other = outside_of(recipe.data.corpus, tmp_path / "outside")
    with_other = _recipe(tiny_inputs, evaluation={"outside": str(other)})
    asked: dict[str, Any] = {"methods": ("random",), "refit": "without"}
    _race(_settings(tiny_inputs, tmp_path / "without", recipe=recipe, **asked))
    _race(_settings(tiny_inputs, tmp_path / "with", recipe=with_other, **asked))
    (without,), (judged,) = _rows(tmp_path / "without").values(), _rows(tmp_path / "with").values()
    assert judged["losses"].pop("validation") == without["losses"]["validation"] != without["losses"]["final"]
    for moment, losses in judged["losses"].items():
        outside = losses["outside"]
        assert losses["outside_mean"] == pytest.approx(np.mean(list(outside.values())))
        assert losses["domains"] == without["losses"][moment]["domains"]
    assert judged["fingerprint"] != without["fingerprint"]


def test_steps_beside_a_teacher_take_its_forward_passes_too(tiny_inputs: Path, tmp_path: Path) -> None:
    alone, taught = _recipe(tiny_inputs), _recipe(tiny_inputs).model_dump(mode="json")
    taught["distill"] = {"weight": 0.5}
    asked: dict[str, Any] = {"methods": ("random",), "refit": "without"}
    made = [
        plan(_settings(tiny_inputs, tmp_path, recipe=recipe, **asked), make_context=RunContext)
        for recipe in (alone, Recipe.model_validate(taught))
    ]
    ((without,), (with_teacher,)) = (each.flops.values() for each in made)
    length = alone.data.sequence_length
    reading = forward_flops_per_token(made[0].source, sequence_length=length) * 10 * TOKENS_PER_STEP
    assert with_teacher.total - without.total == pytest.approx(reading)


def test_models_are_kept_if_asked_for(tiny_inputs: Path, tmp_path: Path) -> None:
    _race(_settings(tiny_inputs, tmp_path, methods=("random",), refit="without", keep_models=True))
    assert (tmp_path / "models" / "random-seed0-10steps" / "model.safetensors").is_file()


def test_a_model_that_was_kept_and_not_written_down_is_judged_where_it_is(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"methods": ("random",), "refit": "without", "keep_models": True}
    _race(_settings(tiny_inputs, tmp_path / "whole", **asked))

    def killed(*arguments: Any, **keywords: Any) -> None:
        running.keep_model(*arguments, **keywords)
        raise KeyboardInterrupt

    monkeypatch.setattr(racing, "keep_model", killed)
    with pytest.raises(KeyboardInterrupt):
        _race(_settings(tiny_inputs, tmp_path / "parts", **asked))
    monkeypatch.undo()
    _race(_settings(tiny_inputs, tmp_path / "parts", **asked))
    (whole,), (parts,) = _rows(tmp_path / "whole").values(), _rows(tmp_path / "parts").values()
    assert parts["losses"] == whole["losses"]
    assert (tmp_path / "parts" / "models" / "random-seed0-10steps" / "model.safetensors").is_file()


def _start(recipe: Path, output: Path, *, said: Path) -> BaseProcess:
    options = ["--methods", "activations,start", "--refit", "with", "--tokens", "640", "--equal", "tokens"]
    return start_shear(["compare", recipe, *options, "-o", output], output=said)


@pytest.mark.slow
def test_a_killed_race_goes_on_to_the_same_rows(tiny_inputs: Path, tmp_path: Path) -> None:
    often = {"checkpoint_interval": "2 steps"}
    path, said = tmp_path / "recipe.yaml", tmp_path / "said.txt"
    path.write_text(yaml.safe_dump(_recipe(tiny_inputs, prune=often, pretrain=often).model_dump(mode="json")))

    def finish(output: Path) -> dict[str, dict[str, Any]]:
        process = _start(path, output, said=said)
        process.join(SECONDS)
        assert process.exitcode == 0, said.read_text()
        return _rows(output)

    whole, killed = finish(tmp_path / "whole"), tmp_path / "killed"
    moments = (
        "scores/activations*.safetensors",
        "work/activations*/pretrain/checkpoints/step-*/manifest.json",
        "rows/activations*",
        "work/start*/prune/checkpoints/step-*/manifest.json",
        "work/start*/compact/complete.json",
    )
    kills = 0
    for number, moment in enumerate(moments):
        process = _start(path, killed, said=said)
        while not any(killed.glob(moment)) and process.exitcode is None:
            time.sleep(0.005)
        (process.terminate if number % 2 else process.kill)()
        process.join(SECONDS)
        kills += process.exitcode != 0
    assert kills > 2
    assert finish(killed) == whole
    assert len(whole) == 2


NO_SIZES = dict.fromkeys(
    ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
)


@pytest.mark.parametrize(
    ("asked", "sections", "says"),
    [
        ({"methods": ("magnitudes",)}, {}, "did you mean magnitude?"),
        ({"rest_by": "reconstructio"}, {}, "did you mean reconstruction?"),
        ({"methods": ("start", "start")}, {}, "each once"),
        ({"seeds": ()}, {}, "at least one"),
        ({"tokens": (63,)}, {}, "at least two steps: 64 tokens"),
        ({"tokens": (96,), "methods": ("paper",)}, {}, "enough steps for the schedule of paper"),
        ({"tokens": (96,), "methods": ("learned",)}, {"prune": {"freeze": "80%"}}, "the schedule of learned"),
        ({"tokens": (96,)}, {"pretrain": {"warmup": "4 steps", "optimizer": "fresh"}}, "pretrain.warmup"),
        ({"flops": float("nan"), "equal": ("flops",)}, {}, "a number of FLOPs, more than 0"),
        ({"flops": -5.0, "equal": ("flops",)}, {}, "a number of FLOPs, more than 0"),
        ({"flops": float("inf"), "equal": ("flops",)}, {}, "a number of FLOPs, more than 0"),
        ({"flops": 1e9, "tokens": (320, 640), "equal": ("tokens", "flops")}, {}, "with one number of --tokens"),
        (
            {},
            {"target": {**NO_SIZES, "parameters": 5000}, "prune": {"estimator": "hard_concrete"}},
            "sizes by name",
        ),
        ({}, {"pretrain": {"lora": {"rank": 2}}}, "all weights train"),
        ({}, {"prune": {"initial_masks": "open"}}, "open ones choose nothing"),
        ({"methods": ("learned",), "refit": "with"}, {"prune": {"sparsity_warmup": "2 steps"}}, "start at the target"),
        ({}, {"data": {"corpus": "nowhere"}}, "a prepared corpus"),
    ],
)
def test_mistakes_are_said_before_anything_runs(
    tiny_inputs: Path, tmp_path: Path, asked: dict[str, Any], sections: dict[str, Any], says: str
) -> None:
    with pytest.raises(ShearingError) as caught:
        _race(_settings(tiny_inputs, tmp_path / "race", recipe=_recipe(tiny_inputs, **sections), **asked))
    assert says in str(caught.value)
    assert not (tmp_path / "race").exists()


def test_a_recipe_with_weights_that_move_has_rows_with_constant_ones(tiny_inputs: Path, tmp_path: Path) -> None:
    moving = {"update": "paper", "step_size": 0.25, "losses": "training", "ema": 0.5}
    settings = _settings(tiny_inputs, tmp_path / "race", recipe=_recipe(tiny_inputs, mixture=moving))
    compare(settings, console=Console(quiet=True), only_plan=True)


def test_a_metric_of_depth_is_for_targets_that_drop_layers(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add(monkeypatch, "depth", Chance, gives=DEPTH)
    recipe = _recipe(tiny_inputs, target={"num_hidden_layers": 4})
    with pytest.raises(ShearingError, match="the target cuts hidden, intermediate, query_heads"):
        _race(_settings(tiny_inputs, tmp_path, recipe=recipe, methods=("depth",)))


def test_a_metric_that_refuses_the_model_is_said_before_anything_runs(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add(monkeypatch, "elsewhere", _OtherFamily)
    with pytest.raises(ShearingError, match=r"model\.source \(architecture\)"):
        _race(_settings(tiny_inputs, tmp_path, methods=("start", "elsewhere")))
    assert not (tmp_path / "rows").exists()


def test_a_folder_of_another_race_is_refused(tiny_inputs: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"methods": ("random",), "refit": "without"}
    _race(_settings(tiny_inputs, tmp_path, **asked))
    before = _rows(tmp_path)
    other = _recipe(tiny_inputs, pretrain={"learning_rate": 2e-3})
    with pytest.raises(ShearingError, match=r"pretrain\.learning_rate was 0\.001 and is 0\.002"):
        _race(_settings(tiny_inputs, tmp_path, recipe=other, **asked))
    with pytest.raises(ShearingError, match=r"pretrain\.learning_rate was 0\.001 and is 0\.002"):
        compare(_settings(tiny_inputs, tmp_path, recipe=other, **asked), console=Console(quiet=True), only_plan=True)
    assert _rows(tmp_path) == before
    # More methods, seeds and budgets are the same race; a row that is there is not run again.
    path = tmp_path / "rows" / "random-seed0-10steps.json"
    write_json(path, {**read_json(path), "marked": True})
    _race(_settings(tiny_inputs, tmp_path, seeds=(0, 1), tokens=(320, 160), **asked))
    assert read_json(path)["marked"]
    assert len(_rows(tmp_path)) == 4


def test_several_processes_are_refused(tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ShearingError, match="without torchrun"):
        _race(_settings(tiny_inputs, tmp_path))


def test_rows_are_small_and_name_no_place(tiny_inputs: Path, tmp_path: Path) -> None:
    _race(_settings(tiny_inputs, tmp_path, methods=("start",), refit="with"))
    for path in (*(tmp_path / "rows").iterdir(), tmp_path / "race.json"):
        text = path.read_text()
        assert str(tmp_path) not in text
        assert str(tiny_inputs) not in text
        assert len(text) < 8000


def test_a_race_outlasts_an_update_of_what_writes_configs(tiny_inputs: Path, tmp_path: Path) -> None:
    source = Path(_recipe(tiny_inputs).model.source)
    said = model_fingerprint(str(source), revision=None)
    other = shutil.copytree(source, tmp_path / "other")
    config = read_json(other / "config.json")
    newer = in_both_spellings(config) | {"transformers_version": "7.0.0"}
    assert newer.keys() > config.keys()
    write_json(other / "config.json", newer)
    assert model_fingerprint(str(other), revision=None) == said
    write_json(other / "config.json", newer | {"rms_norm_eps": 1e-3})
    assert model_fingerprint(str(other), revision=None) != said
