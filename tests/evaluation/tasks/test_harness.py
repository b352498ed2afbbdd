"""The harness in this process gives what its own command gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shearing.errors import ShearingError
from shearing.evaluation.tasks.chosen import PRESETS, ChosenTask

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

TASKS = ("letters_choice", "letters_last", "letters_written")


def write_tasks(folder: Path) -> Path:
    """Three kinds of tasks over letters: multiple choice, the last letter, and letters to write."""
    folder.mkdir()
    letters = "abcdefgh"
    lines = [
        {
            "question": letters[i % 8] * (1 + i % 5),
            "choices": [letters[(i + k) % 8] * (1 + k) for k in range(3)],
            "gold": i % 3,
        }
        for i in range(23)
    ]
    data = folder / "letters.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
        "test_split": "test",
        "training_split": "train",
        "target_delimiter": "",
        "fewshot_delimiter": "ab",
        "metadata": {"version": 2.0},
    }
    kinds: dict[str, dict[str, Any]] = {
        "letters_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")],
            "num_fewshot": 2,
        },
        "letters_last": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[0]}}",
            "metric_list": [
                {"metric": name, "aggregation": how} for name, how in (("perplexity", "perplexity"), ("acc", "mean"))
            ],
        },
        "letters_written": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["a"], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
        },
    }
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **kind}))
    return folder


def measured(
    model: Path, folder: Path, *, limit: int | None = None, processes: Any = None
) -> dict[str, dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shearing.evaluation.tasks.harness import Harness

    harness = Harness(folder=folder, names=TASKS)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    results: dict[str, dict[str, Any]] = {}
    for name in TASKS:
        results |= harness.measure(
            loaded, ChosenTask(name), tokenizer=tokenizer, limit=limit, batch_size=4, processes=processes
        )
    return results


@pytest.mark.slow
def test_figures_are_those_of_the_harness_own_command(tiny_inputs: Path, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    model = tiny_inputs / "model"
    ours = measured(model, folder)
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
    ]
    command += ["--tasks", *TASKS, "--include_path", str(folder), "--device", "cpu", "--batch_size", "4"]
    command += ["--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DISABLE_MULTIPROC": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(written.read_text())
    assert list(ours) == list(TASKS)
    for name in TASKS:
        for metric, figures in ours[name]["metrics"].items():
            assert figures["value"] == theirs["results"][name][f"{metric},none"], (name, metric)
            if metric != "perplexity":  # whose error is drawn, a hundred times as often there
                assert figures["stderr"] == theirs["results"][name][f"{metric}_stderr,none"], (name, metric)
        assert ours[name]["fewshot"] == theirs["n-shot"][name]
        assert ours[name]["items"] == 23
        assert ours[name]["version"] == 2.0
    assert ours["letters_choice"]["metric"] == "acc_norm"
    assert ours["letters_choice"]["fewshot"] == 2
    assert ours["letters_last"]["metrics"]["perplexity"]["higher_is_better"] is False
    assert 0 < ours["letters_choice"]["value"] < 1


def test_data_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    from shearing.evaluation.tasks.harness import Harness

    folder = write_tasks(tmp_path / "tasks")
    (folder / "letters.jsonl").unlink()
    with pytest.raises(ShearingError, match=r"letters_last: .*[\s\S]*task_folder"):
        Harness(folder=folder, names=["letters_last"]).load("letters_last")


@pytest.mark.slow
def test_presets_are_tasks_of_the_harness_and_a_name_that_is_nobodys_is_said_with_the_nearest() -> None:
    from shearing.evaluation.tasks.harness import Harness

    names = [task.name for tasks in PRESETS.values() for task in tasks]
    with pytest.raises(ShearingError, match=r"'hellaswagg'[\s\S]*is it hellaswag"):
        Harness(folder=None, names=[*names, "hellaswagg"])
