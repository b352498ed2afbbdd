"""`shear eval` of a model that is of no run, and what it takes with a recipe or a run's folder."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from shearing.cli.frame import app
from shearing.files.durable import read_json
from shearing.runs.recipe import load_recipe
from shearing.runs.stages.evaluation import alone
from tests.cli.test_cli import error_of


def shear_eval(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "80"})


def test_a_model_without_a_run_is_asked_tasks_or_nothing(tiny_inputs: Path, tmp_path: Path) -> None:
    assert "add --tasks paper11" in error_of("eval", tiny_inputs / "model")
    assert "MODEL = " in error_of("eval", tmp_path, "--tasks", "piqa")
    said = error_of("eval", tiny_inputs / "model", "seed=1", "--tasks", "piqa")
    assert "KEY=VALUE with a recipe or the folder of a run" in said
    assert "--gpus" in error_of("eval", tiny_inputs / "model", "--gpus", "2")


def test_a_model_is_asked_once_and_its_figures_are_kept(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from tests.evaluation.tasks.test_harness import measured, write_tasks

    monkeypatch.setenv("SHEARING_CACHE", str(tmp_path / "cache"))
    folder = write_tasks(tmp_path / "tasks")
    arguments = (tiny_inputs / "model", "--tasks", "letters_choice, letters_last", "--task-folder", folder)
    result = shear_eval(*arguments)
    assert result.exit_code == 0, result.output
    figures = measured(tiny_inputs / "model", folder)
    for name in ("letters_choice", "letters_last"):
        (line,) = (line.split() for line in result.stdout.splitlines() if line.split()[:1] == [name])
        assert line[1] == figures[name]["metric"]
        assert line[3] == "23"
        assert line[4].startswith(f"{100 * figures[name]['value']:.1f}±")
    kept = sorted((tmp_path / "cache" / "tasks").iterdir())
    assert len(kept) == 2
    before = [path.stat().st_mtime_ns for path in kept]
    assert shear_eval(*arguments).stdout == result.stdout
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert "--tasks = 'letters'" in error_of("eval", *arguments[:2], "letters", "--task-folder", folder)
    assert "--task-folder = " in error_of("eval", *arguments[:3], "--task-folder", tmp_path / "nowhere")


def test_a_model_is_asked_again_once_one_of_its_files_changed(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[None] = []

    def measure(*_: object, **__: object) -> dict[str, Any]:
        asked.append(None)
        return {"piqa": {"metric": "acc", "fewshot": 0, "items": 1, "value": 0.5, "stderr": 0.1}}

    def times_asked(place: Path) -> int:
        alone.ask(place, tasks=["piqa"], console=Console(file=io.StringIO()))
        return len(asked)

    monkeypatch.setenv("SHEARING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(alone, "open_harness", lambda *_, **__: SimpleNamespace(measure=measure))
    folder, link = Path(shutil.copytree(tiny_inputs / "model", tmp_path / "model")), tmp_path / "link"
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    assert times_asked(folder) == 1
    (folder / "README.md").write_text("figures")
    link.symlink_to(folder)
    assert times_asked(link) == 1
    names = ("config.json", "generation_config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json")
    for times, name in enumerate(names, start=2):
        (folder / name).touch()
        assert [times_asked(folder), times_asked(folder)] == [times, times], name
    link.unlink()
    link.symlink_to(shutil.copytree(folder, tmp_path / "other"))
    assert times_asked(link) == len(names) + 2


def test_a_run_is_named_by_its_folder_and_asked_more(tiny_recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from tests.evaluation.tasks.test_harness import write_tasks

    run_dir = load_recipe(tiny_recipe).run_dir
    first = shear_eval(tiny_recipe)
    assert first.exit_code == 0, first.output
    assert "tasks" not in read_json(run_dir / "evaluation.json")["models"]["source"]
    run_dir = run_dir.rename(tmp_path / "moved")
    folder = write_tasks(tmp_path / "tasks")
    options = ["--tasks", "letters_choice", "--limit", "5", "--fewshot", "1", "--task-folder", str(folder)]
    result = shear_eval(run_dir, *options)
    assert result.exit_code == 0, result.output
    found = read_json(run_dir / "evaluation.json")["models"]["source"]["tasks"]["letters_choice"]
    assert (found["items"], found["fewshot"]) == (5, 1)
    assert json.dumps("letters_choice")[1:-1] in (run_dir / "report.html").read_text()
    assert "evaluation.task_folder = " in error_of("eval", run_dir, "--task-folder", tmp_path / "nowhere")
