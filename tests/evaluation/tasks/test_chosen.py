"""Names of tasks, presets unfolded; a harness that is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from shearing.errors import ShearingError
from shearing.evaluation.tasks.chosen import ChosenTask, chosen_tasks
from shearing.evaluation.tasks.opening import open_harness


def test_the_papers_eleven_tasks_with_their_examples() -> None:
    tasks = chosen_tasks(["paper11"])
    assert len(tasks) == 11
    shots = {task.name: task.fewshot for task in tasks if task.fewshot}
    assert shots == {"arc_challenge": 25, "hellaswag": 10, "boolq": 32, "nq_open": 32, "mmlu": 5}


def test_names_and_presets_go_together_and_each_task_once() -> None:
    tasks = chosen_tasks(["piqa", "paper11", "mine"])
    assert [task.name for task in tasks][:3] == ["piqa", "sciq", "winogrande"]
    assert len(tasks) == 12
    assert tasks[0] == ChosenTask("piqa", metric="acc")
    assert tasks[-1] == ChosenTask("mine")
    assert {task.fewshot for task in chosen_tasks(["paper11"], fewshot=3)} == {3}


def test_a_harness_that_is_not_installed_is_said_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ShearingError, match=r"pip install 'shearing\[lm-eval\]'"):
        open_harness(chosen_tasks(["piqa"]), folder=None)


def test_a_folder_that_is_not_there_is_said_before_the_harness_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "there")
    with pytest.raises(ShearingError, match=r"task_folder = .*nowhere"):
        open_harness(chosen_tasks(["piqa"]), folder=tmp_path / "nowhere")
