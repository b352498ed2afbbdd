"""Searches: candidates that go on are those trained without a break, and whoever works on them, it is one search."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from shearing.cli.frame import app
from shearing.errors import ShearingError
from shearing.evaluation.layer_times import Entry, LayerTimes, Times
from shearing.files.durable import read_json, write_text
from shearing.models.shape import Shape
from shearing.runs.continuation import extension
from shearing.runs.continuation.extension import change
from shearing.runs.planning import preflight
from shearing.runs.planning.hardware import Hardware
from shearing.runs.race.judging import losses_of
from shearing.runs.recipe import Recipe, load_recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.search import pricing, running, search as searching
from shearing.runs.search.candidates import Candidate
from shearing.runs.search.plan import STAGES, SearchFolder, SearchPlan, recipe_of
from shearing.runs.search.search import Search, SearchSettings, search
from shearing.runs.stages.run import run
from tests.conftest import tiny_recipe_data
from tests.forks import start_shear
from tests.repository import RECIPES

ROUNDS = ["3 x 96", "2 x 192", "1 x 320"]
NAMED = {
    "narrow": {"hidden_size": 16, "num_hidden_layers": 3},
    "short": {"num_hidden_layers": 1},
    "few": {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24},
}


def data_of(inputs: Path, **keys: Any) -> dict[str, Any]:
    data = tiny_recipe_data(inputs, run_dir=Path("unused"))
    data["pretrain"] |= {"optimizer": "fresh", "warmup": "20%"}
    data["search"] = {"multiple_of": 4, "tolerance": 0.1, "rounds": ROUNDS, **keys}
    return data


def recipe(inputs: Path, **keys: Any) -> Recipe:
    return Recipe.model_validate(data_of(inputs, **keys))


def searched(recipe: Recipe, output: Path, **asked: Any) -> dict[str, Any]:
    return search(SearchSettings(recipe=recipe, output=output, **asked), console=Console(quiet=True))


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Without what depends on the machine."""
    for line in results["candidates"]:
        for each in line["rounds"]:
            each.pop("seconds")
    return results


def test_what_goes_on_is_what_was_trained_without_a_break(tiny_inputs: Path, tmp_path: Path) -> None:
    asked = recipe(tiny_inputs, candidates=NAMED)
    results = searched(asked, tmp_path / "out")
    folder = SearchFolder(path=tmp_path / "out")
    winner = next(line for line in results["candidates"] if line["name"] == results["winner"])
    assert [len(line["rounds"]) for line in results["candidates"]] == [3, 2, 1]
    shape = Candidate.from_json(winner, source=_source(tiny_inputs))
    whole = recipe_of(asked, shape, number=3, folder=SearchFolder(path=tmp_path / "whole"))
    assert whole.pretrain.schedule == "wsd"
    directory = run(whole, stages=STAGES, console=Console(quiet=True))
    ours, theirs = (
        load_file(each / "model.safetensors")
        for each in (RunDirectory(folder.run(winner["name"])).model, directory.model)
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    # Validation text has chosen: the best of each round went on.
    for number in range(2):
        losses = {
            line["name"]: line["rounds"][number]["validation"]
            for line in results["candidates"]
            if len(line["rounds"]) > number
        }
        assert winner["name"] in losses
        on = {line["name"] for line in results["candidates"] if len(line["rounds"]) > number + 1}
        assert on == set(sorted(losses, key=losses.__getitem__)[: len(on)])
    assert winner["rounds"][-1]["test"]["mean"] > 0
    # Of those that are out, figures stay.
    out = RunDirectory(folder.run(results["candidates"][-1]["name"]))
    assert out.metrics("pretrain").is_file()
    assert not out.compact.exists()
    assert load_recipe(folder.recipe).pruning.target.hidden_size == winner["hidden_size"]
    assert load_recipe(folder.recipe).search is None
    assert "| shape |" in folder.tables.read_text()
    assert folder.picture.read_text().startswith("<?xml")
    # It is over: nothing runs again.
    assert figures(searched(asked, tmp_path / "out")) == figures(results)


def test_two_processes_of_which_one_is_killed_are_one_search(tiny_inputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data_of(tiny_inputs, rounds=["3 x 96", "1 x 160"])))
    asked = load_recipe(file)
    alone = figures(searched(asked, tmp_path / "alone"))
    made = Search(SearchSettings(recipe=asked, output=tmp_path / "both"), console=Console(quiet=True))
    plan = made.prepare()
    assert len(plan.candidates) == 3
    assert plan.candidates[0].is_target
    command: Sequence[str | Path] = ["search", file, "--output", tmp_path / "both", "--join"]
    killed, other = (start_shear(command, output=tmp_path / f"{index}.log") for index in range(2))
    until = time.monotonic() + 120
    while not list((tmp_path / "both").glob("candidates/*/round-1.json")) and time.monotonic() < until:
        time.sleep(0.001)
    killed.kill()
    killed.join()
    other.join()
    assert other.exitcode == 0, (tmp_path / "1.log").read_text()
    assert figures(made.finish(plan)) == alone


def test_a_candidate_that_fails_is_out_and_the_search_goes_on(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(recipe: Recipe, **keywords: Any) -> RunDirectory:
        if recipe.name == "short":
            raise RuntimeError("no such luck\nsecond line")
        return run(recipe, **keywords)

    monkeypatch.setattr(running, "run", fails)
    two = {name: NAMED[name] for name in ("short", "narrow")}
    asked = recipe(tiny_inputs, candidates=two, rounds=["2 x 64"], decay="0 steps")
    results = searched(asked, tmp_path / "out")
    failed = next(line for line in results["candidates"] if line["name"] == "short")
    assert failed["failed"] == "no such luck"
    assert results["winner"] == "narrow"
    monkeypatch.setattr(running, "run", run)
    again = searched(asked, tmp_path / "out", retry_failed=True)
    assert not [line for line in again["candidates"] if line["failed"]]


TIMES = LayerTimes(
    entries=[
        Entry(
            hidden_size=d,
            intermediate_size=m,
            num_attention_heads=H,
            num_key_value_heads=2,
            layer=Times(prompt=1.0 + d * m / 1000, next_token=0.5),
            rest=Times(prompt=2.0, next_token=1.0),
        )
        for H in (2, 4)
        for d in (12, 32)
        for m in (16, 48)
    ],
    context=512,
    dtype="bfloat16",
)


def test_a_latency_is_spent_as_the_table_of_layers_says(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "measure_layers", lambda *_, **__: TIMES)
    asked = recipe(tiny_inputs, latency=6.0, latency_of="prompt")
    made = Search(SearchSettings(recipe=asked, output=tmp_path / "out"), console=Console(quiet=True))
    plan = made.plan()
    assert plan.candidates
    for candidate in plan.candidates:
        assert 0.9 * 6.0 <= TIMES.of(candidate.shape).prompt <= 6.0
    # Times of whole models are beside it, and how far off the table was.
    made = Search(SearchSettings(recipe=asked, output=tmp_path / "out"), console=Console(quiet=True))
    results = made.finish(made.prepare())
    assert results["prediction_error"]["prompt"] > 0
    assert results["candidates"][0]["measured_ms"]["next_token"] > 0
    assert results["winner"] is None


def test_memory_is_spent(tiny_inputs: Path, tmp_path: Path) -> None:
    asked = recipe(tiny_inputs, memory="30 KB", batch_size=2, context=64)
    made = Search(SearchSettings(recipe=asked, output=tmp_path / "out"), console=Console(quiet=True))
    for candidate in made.plan().candidates:
        shape = candidate.shape
        cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 64 * 2
        assert 0.9 * 30_000 <= 2 * (shape.num_parameters() + cache) <= 30_000


@pytest.mark.parametrize(
    ("keys", "sections", "says"),
    [
        ({"parameters": 100}, {}, "nearest"),
        ({"parameters": 10**7}, {}, "a budget that some shape spends"),
        ({"latency": 0.5}, {}, "the fastest is the first"),
        ({"candidates": {"wide": {"hidden_size": 64}}}, {}, r"search.candidates.wide (hidden_size) = 64"),
        ({"candidates": {"a": {"hidden_size": 16}, "b": {"hidden_size": 16}}}, {}, "the same"),
        ({"candidates": {"fit": NAMED["few"], "same": {"hidden_size": 32}}}, {}, "search.candidates.same (target) = "),
        (
            {"candidates": {"fit": {"intermediate_size": 40}, "a": {"num_hidden_layers": 2}}},
            {"prune": {"granularities": ["intermediate"]}},
            "search.candidates.a (prune.granularities) = ",
        ),
        ({"rounds": ["2 x 90", "2 x 96"]}, {}, "by a step at least, of 32 tokens"),
        ({"decay": "6 steps"}, {}, "what the last round adds: 4 steps"),
        ({"hidden": [0.3, 0.31], "multiple_of": 16}, {}, "no shape at all"),
        ({}, {"prune": {"initial_masks": "open"}}, "candidates are cut by scores"),
        ({}, {"pretrain": {"lora": {"rank": 2}}}, "none in a search of shapes"),
    ],
)
def test_mistakes_are_said_before_anything_runs(
    tiny_inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    sections: dict[str, Any],
    says: str,
) -> None:
    monkeypatch.setattr(searching, "measure_layers", lambda *_, **__: TIMES)
    data = data_of(tiny_inputs, **keys)
    for name, values in sections.items():
        data[name] |= values
    with pytest.raises(ShearingError) as caught:
        searched(Recipe.model_validate(data), tmp_path / "out")
    assert says in str(caught.value)
    assert not list((tmp_path / "out").glob("candidates*"))


def test_a_disk_that_is_too_small_is_said_of_the_output(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "bytes_free", lambda _: 10)
    made = Search(SearchSettings(recipe=recipe(tiny_inputs), output=tmp_path / "out"), console=Console(quiet=True))
    with pytest.raises(ShearingError, match=r"--output = .*\n.*of free disk.*\n.*\(--output\)"):
        made.prepare()


def test_a_folder_of_another_search_is_refused(tiny_inputs: Path, tmp_path: Path) -> None:
    def made(**keys: Any) -> Search:
        asked = SearchSettings(recipe=recipe(tiny_inputs, **keys), output=tmp_path / "out")
        return Search(asked, console=Console(quiet=True))

    with pytest.raises(ShearingError, match="a search that has begun"):
        made().join()
    made().prepare()
    with pytest.raises(ShearingError, match="search was"):
        made(multiple_of=8).prepare()
    with pytest.raises(ShearingError, match="search was"):
        made(candidates=NAMED).plan()
    assert made().join().candidates == made().prepare().candidates == made().plan().candidates


def test_a_mistake_is_no_search_that_has_begun(tiny_inputs: Path, tmp_path: Path) -> None:
    def made(**keys: Any) -> Search:
        asked = SearchSettings(recipe=recipe(tiny_inputs, **keys), output=tmp_path / "out")
        return Search(asked, console=Console(quiet=True))

    with pytest.raises(ShearingError):
        made(hidden=[0.3, 0.31], multiple_of=16).prepare()
    made().prepare()


def test_a_candidate_that_failed_early_is_run_again_when_its_weights_are_gone(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: Any, *, context: Any, **keywords: Any) -> dict[str, Any]:
        if context.recipe.name == "short":
            raise ArithmeticError("no number")
        return losses_of(model, context=context, **keywords)

    monkeypatch.setattr(running, "losses_of", fails)
    two = {name: NAMED[name] for name in ("short", "narrow")}
    asked = recipe(tiny_inputs, candidates=two, rounds=["2 x 64", "1 x 96"], decay="0 steps")
    results = searched(asked, tmp_path / "out")
    assert [line["failed"] for line in results["candidates"] if line["failed"]] == ["no number"]
    monkeypatch.setattr(running, "losses_of", losses_of)
    again = searched(asked, tmp_path / "out", retry_failed=True)
    assert not [line for line in again["candidates"] if line["failed"]]


def test_a_kill_as_a_candidate_goes_on_leaves_no_trace(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(tiny_inputs, candidates={"narrow": NAMED["narrow"]}, rounds=["1 x 64", "1 x 128"], decay="1 steps")
    alone = figures(searched(asked, tmp_path / "alone"))

    def stops(error: BaseException) -> None:
        """As the recipe of the second round is written, all else of the first being out of the way."""

        def write(path: Path, text: str) -> None:
            assert not RunDirectory(path.parent).is_complete("pretrain")
            raise error

        monkeypatch.setattr(extension, "write_text", write)

    stops(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        searched(asked, tmp_path / "out")
    monkeypatch.setattr(extension, "write_text", write_text)
    assert figures(searched(asked, tmp_path / "out")) == alone
    # One that fails there, and one that fails when it is longer, have lost their weights; run again they are the same.
    stops(RuntimeError("no such luck"))
    assert searched(asked, tmp_path / "failed")["candidates"][0]["failed"] == "no such luck"
    monkeypatch.setattr(extension, "write_text", write_text)

    def fails(model: Any, *, context: Any, **keywords: Any) -> dict[str, Any]:
        raise ArithmeticError("no number")

    monkeypatch.setattr(running, "losses_of", fails)
    searched(asked, tmp_path / "failed", retry_failed=True)
    monkeypatch.setattr(running, "losses_of", losses_of)
    assert figures(searched(asked, tmp_path / "failed", retry_failed=True)) == alone
    # A run that is longer than its round, as that was taken out by hand, is no figure of it.
    SearchFolder(path=tmp_path / "out").record("narrow", number=1).unlink()
    with pytest.raises(ShearingError, match="trained for 4 steps, not the 2 of round 1"):
        searched(asked, tmp_path / "out")


def test_a_search_that_is_moved_goes_on_where_it_is(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(tiny_inputs, candidates={"narrow": NAMED["narrow"]}, rounds=["1 x 64", "1 x 128"], decay="1 steps")
    alone = figures(searched(asked, tmp_path / "alone"))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "change", stop)
    with pytest.raises(KeyboardInterrupt):
        searched(asked, tmp_path / "out")
    monkeypatch.setattr(running, "change", change)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert figures(searched(asked, tmp_path / "moved")) == alone
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("beside", [["--plan"], ["--retry-failed"], ["--processes", "2"]])
def test_what_joining_has_no_use_for_is_refused(beside: list[str], tiny_inputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data_of(tiny_inputs)))
    result = CliRunner().invoke(app, ["search", str(file), "--join", *beside, "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "nothing beside --join" in result.stderr


def test_a_plan_prices_the_search(tiny_inputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data_of(tiny_inputs)))
    # 3 x 96, then 96 more for two, then 128 more for one.
    for command in (["plan", str(file)], ["search", str(file), "--plan", "--output", str(tmp_path / "out")]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert "608 tokens and" in result.output
    assert not (tmp_path / "out" / "candidates").exists()


def test_hours_are_of_the_gpu_that_is_planned_for(tiny_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    monkeypatch.setattr(pricing, "plan_table", lambda *_, flops_per_second, **__: rates.append(flops_per_second))
    data = data_of(tiny_inputs)
    data["training"] |= {"device": "cuda", "precision": "auto"}  # which is not here
    hardware = Hardware.of(processes=2, gpu="H100", gigabytes=None, mfu=0.5)
    pricing.price(Recipe.model_validate(data), hardware=hardware)
    assert hardware.gpu is not None
    assert rates == [hardware.gpu.peak[torch.bfloat16]]


def test_a_plan_prices_the_candidates_that_are_raced(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    priced: list[SearchPlan] = []
    monkeypatch.setattr(pricing, "plan_table", lambda plan, **_: priced.append(plan))
    data = data_of(tiny_inputs)
    data["prune"] |= {"rotate": "pca", "rotate_tied": "untie"}  # a matrix more than the source has
    asked = Recipe.model_validate(data)
    pricing.price(asked, hardware=Hardware.of(processes=1, gpu="H100", gigabytes=None, mfu=0.5))
    raced = Search(SearchSettings(recipe=asked, output=tmp_path / "out"), console=Console(quiet=True)).plan()
    assert priced == [raced]
    assert not any(candidate.shape.tied for candidate in raced.candidates)


def test_the_warm_up_is_that_of_the_stage_whose_optimiser_starts_from_nothing(
    tiny_inputs: Path, tmp_path: Path
) -> None:
    candidate = Candidate(name="any", shape=_source(tiny_inputs))

    def warmup(asked: Recipe) -> int | None:
        return recipe_of(asked, candidate, number=1, folder=SearchFolder(path=Path("unused"))).pretrain.warmup.steps

    def warmup_with(optimizer: str, *, steps: int) -> int | None:
        data = data_of(tiny_inputs)
        data["prune"] |= {"duration": f"{steps} steps", "freeze": "0 steps", "warmup": "50%"}
        data["pretrain"] |= {"optimizer": optimizer, "warmup": "10%"}
        return warmup(Recipe.model_validate(data))

    # A tenth of the ten steps of the last round, or half of those of mask learning.
    assert warmup_with("fresh", steps=4) == 1
    assert warmup_with("carried", steps=4) == 2
    assert warmup_with("carried", steps=0) == 1
    # A search that was begun with another warm-up is another one.
    data = data_of(tiny_inputs)
    data["prune"] |= {"duration": "4 steps", "freeze": "0 steps", "warmup": "50%"}
    for optimizer, said in (("carried", "2 steps"), ("fresh", None)):
        data["pretrain"] |= {"optimizer": optimizer, "warmup": "10%"}
        asked = SearchSettings(recipe=Recipe.model_validate(data), output=tmp_path / optimizer)
        Search(asked, console=Console(quiet=True)).prepare()
        assert read_json(tmp_path / optimizer / "race.json").get("warmup") == said
    # Rows of results rest on this one.
    assert warmup(load_recipe(RECIPES / "shapes-135m.yaml")) == 8


def _source(inputs: Path) -> Shape:
    from transformers import AutoConfig

    return Shape.of(AutoConfig.from_pretrained(inputs / "model"))
