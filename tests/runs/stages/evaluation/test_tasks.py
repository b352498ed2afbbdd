"""Tasks for the models of a run: who is asked, what is kept, on one process and on two."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shearing.errors import ShearingError
from shearing.processes.processes import Processes
from shearing.runs.context import RunContext
from shearing.runs.planning.preflight import preflight
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.evaluate import evaluate
from shearing.runs.stages.evaluation.recipe import GenerationRecipe
from shearing.runs.stages.run import run
from tests.conftest import tiny_recipe_data
from tests.distributed.harness import spawn
from tests.distributed.runs import difference

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from shearing.evaluation.tasks.harness import Harness
from tests.evaluation.tasks.test_harness import write_tasks

ASKED = ["letters_choice", "letters_last"]


@pytest.fixture(scope="module")
def finished(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run that is complete but for its evaluation."""
    folder = tmp_path_factory.mktemp("judged")
    data = tiny_recipe_data(tiny_inputs, run_dir=folder / "run")
    data["evaluation"] |= {"tasks": ASKED, "task_folder": str(write_tasks(folder / "tasks")), "task_limit": 11}
    recipe = Recipe.model_validate(data)
    run(recipe, stages=["prune", "compact", "pretrain"], console=Console(file=io.StringIO()))
    return recipe


def quiet(recipe: Recipe, **parts: Any) -> RunContext:
    return RunContext(recipe, console=Console(file=io.StringIO(), width=80), **parts)


def having(recipe: Recipe, **evaluation: Any) -> Recipe:
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=evaluation)})


def tasks_of(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {name: model["tasks"] for name, model in evaluation["models"].items() if "tasks" in model}


def test_source_and_models_of_the_run_are_asked_and_each_figure_is_kept(
    finished: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = quiet(finished)
    evaluation = evaluate(context)
    assert list(tasks_of(evaluation)) == ["source", "compact", "final"]
    for found in tasks_of(evaluation).values():
        assert list(found) == ASKED
        assert {each["items"] for each in found.values()} == {11}
        assert found["letters_choice"]["stderr"] > 0
        assert found["letters_choice"]["fewshot"] == 2
    assert json.loads(RunDirectory(finished.run_dir).evaluation.read_text()) == evaluation
    printed = context.console.file.getvalue()  # type: ignore[attr-defined]
    assert "tasks, % ± error" in printed
    assert "Over 2 tasks it reaches" in " ".join(printed.split())

    asked: list[str] = []
    original = Harness.measure

    def counted(self: Harness, model: Any, task: Any, **keywords: Any) -> Any:
        asked.append(task.name)
        return original(self, model, task, **keywords)

    monkeypatch.setattr(Harness, "measure", counted)
    assert tasks_of(evaluate(quiet(finished))) == tasks_of(evaluation)
    assert asked == []
    more = evaluate(quiet(having(finished, task_baselines=True)))
    assert asked == ASKED
    assert set(tasks_of(more)) == {*tasks_of(evaluation), "random"}
    (RunDirectory(finished.run_dir).model / "model.safetensors").touch()
    evaluate(quiet(finished))
    assert asked == ASKED * 2
    fewer = evaluate(quiet(having(finished, fewshot=0, tasks=["letters_choice"])))
    assert asked == [*ASKED * 2, *["letters_choice"] * 3]
    assert {found["letters_choice"]["fewshot"] for found in tasks_of(fewer).values()} == {0}
    assert not any("tasks" in model for model in evaluate(quiet(having(finished, tasks=[])))["models"].values())


def test_what_was_interrupted_goes_on_with_the_next_task(
    finished: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("judged", "evaluation*"))
    recipe = finished.model_copy(update={"run_dir": tmp_path / "run"})
    asked: list[str] = []
    original = Harness.measure

    def killed_at_the_third(self: Harness, model: Any, task: Any, **keywords: Any) -> Any:
        asked.append(task.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return original(self, model, task, **keywords)

    monkeypatch.setattr(Harness, "measure", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate(quiet(recipe))
    interrupted = evaluate(quiet(recipe))
    assert asked == [*ASKED, ASKED[0], *ASKED, *ASKED]
    for kept in (tmp_path / "run" / "judged").glob("task-*"):
        kept.unlink()
    assert tasks_of(evaluate(quiet(recipe))) == tasks_of(interrupted)


def share(recipe: Recipe, output: Path) -> None:
    with Processes.start(device="cpu") as processes:
        evaluation = evaluate(quiet(recipe, processes=processes))
        (output / f"{processes.rank}.json").write_text(json.dumps(evaluation))


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["replicate", "shard"])
def test_two_processes_find_what_one_finds(placement: str, finished: Recipe, tmp_path: Path) -> None:
    """Whether each has all of a model or some rows of its matrices: how many passes each makes is its own business."""
    shutil.copytree(finished.run_dir, tmp_path / "run")
    generation = GenerationRecipe(prompts=3, prompt_tokens=8, tokens=6, text_tokens=48)
    recipe = having(
        finished,
        task_baselines=True,
        tasks=[*ASKED, "letters_written"],
        generation=generation,
        speed=True,
        placement=placement,
        baselines=["random", "activations+refit"],
    )
    recipe = recipe.model_copy(update={"run_dir": tmp_path / "run"})
    alone = evaluate(quiet(recipe))
    shutil.rmtree(tmp_path / "run" / "judged")
    (tmp_path / "run" / "evaluation.json").unlink()
    spawn(share, recipe, tmp_path, size=2, folder=tmp_path / "processes")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert tasks_of(first).keys() == tasks_of(alone).keys() > {"random", "activations+refit"}
    for name, found in tasks_of(alone).items():
        for task, result in found.items():
            there = tasks_of(first)[name][task]
            assert there["items"] == result["items"] == 11
            # A refit from shares of the text equals that from all of it to 1e-4.
            assert there["value"] == pytest.approx(result["value"], rel=1e-3 if "refit" in name else 1e-6), (name, task)
    for name in ("source", "compact", "final"):
        ours, theirs = (each["models"][name] for each in (first, alone))
        assert difference(ours["generation"], theirs["generation"]) < 1e-5
        # Of what no device can hold there is no speed.
        assert (ours["speed"] is None) == (placement == "shard" or name == "compact")
    assert not (tmp_path / "run" / ".cut").exists()


def test_what_is_not_to_be_had_is_said_before_the_first_stage(finished: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ShearingError, match=r"evaluation\.task_folder = .*nowhere"):
        preflight(quiet(having(finished, task_folder=tmp_path / "nowhere")))
    folder = write_tasks(tmp_path / "tasks")
    (folder / "letters.jsonl").unlink()
    without = having(finished, task_folder=folder)
    with pytest.raises(ShearingError, match=r"evaluation\.tasks = .letters_choice: [\s\S]*evaluation\.task_folder"):
        preflight(quiet(without))
    preflight(quiet(without), stages=["prune"])
