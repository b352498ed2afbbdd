"""Training on answers alone: the loss is that of the labels that count; a run that was killed is the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from shearing.data.corpus.counted import BitsWriter, counted_path
from shearing.runs.context import RunContext
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.run import run
from tests.conftest import tiny_recipe_data
from tests.data.corpus.answers import with_answers
from tests.distributed import runs
from tests.forks import PROCESSES


def recipe_of(inputs: Path, folder: Path, *, steps: int, name: str = "run", **data: Any) -> Recipe:
    """Continued pretraining of the source, one domain of answers."""
    values = tiny_recipe_data(inputs, run_dir=folder / name)
    corpus = folder / "corpus"
    if not corpus.exists():
        with_answers(inputs / "corpus", corpus, domain="letters")
    values["target"] = values["prune"] = None
    values["data"] |= {"corpus": str(corpus), **data}
    values["evaluation"]["baselines"] = []
    values["pretrain"] |= {"duration": f"{steps} steps", "batch_size": "4 sequences", "checkpoint_interval": "2 steps"}
    return Recipe.model_validate(values)


@pytest.mark.parametrize("across", [True, False])
def test_the_loss_of_a_step_is_that_of_what_counts(across: bool, tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_inputs, tmp_path, steps=1, loss_across_documents=across)
    run(recipe, stages=("pretrain",))
    [line] = [line for line in runs.lines(recipe.run_dir, "pretrain") if "loss" in line]
    context = RunContext(recipe)
    batch = context.initial_mixture().batch(first_sample=0, num_sequences=4)
    assert batch.counted is not None
    labels = batch.tokens[:, 1:].masked_fill(~batch.counted[:, 1:], -100)
    if not across:
        assert batch.positions is not None
        labels = labels.masked_fill(batch.positions[:, 1:] == 0, -100)
    model = AutoModelForCausalLM.from_pretrained(tiny_inputs / "model")
    with torch.no_grad():
        logits = model(input_ids=batch.tokens[:, :-1]).logits
    assert 0 < int((labels != -100).sum()) < labels.numel()
    assert line["loss"] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), rel=1e-5)


def test_a_run_that_was_killed_is_the_same(tiny_inputs: Path, tmp_path: Path) -> None:
    whole, killed = (recipe_of(tiny_inputs, tmp_path, steps=4, name=name) for name in ("whole", "killed"))
    run(whole, stages=("pretrain",))
    process = PROCESSES.Process(target=run, args=(killed,), kwargs={"stages": ("pretrain",)})
    process.start()
    newest = RunDirectory(killed.run_dir).checkpoints("pretrain") / "step-00000002"
    while process.is_alive() and not newest.exists():
        process.join(0.001)
    process.kill()
    process.join()
    run(killed, stages=("pretrain",))
    assert list(runs.contents(killed.run_dir, "pretrain")) == list(runs.contents(whole.run_dir, "pretrain"))


def _with_a_late_answer(inputs: Path, folder: Path) -> None:
    """A corpus in which the end alone of the validation text of letters counts."""
    shutil.copytree(inputs / "corpus", folder)
    path = folder / "letters" / "manifest.json"
    manifest = json.loads(path.read_text())
    for part, counts in manifest["parts"].items():
        bits = np.arange(counts["tokens"]) >= (counts["tokens"] - 32 if part == "validation" else 0)
        writer = BitsWriter(counted_path(folder / "letters", part))
        writer.write(bits)
        counts["counted"], counts["counted_sha256"] = writer.count, writer.close()
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("stage", ["prune", "pretrain"])
def test_nothing_counts_in_the_rows_that_are_looked_at(
    stage: Literal["prune", "pretrain"], tiny_inputs: Path, tmp_path: Path
) -> None:
    _with_a_late_answer(tiny_inputs, tmp_path / "corpus")
    values = tiny_recipe_data(tiny_inputs, run_dir=tmp_path / "run")
    values["data"]["corpus"] = str(tmp_path / "corpus")
    values["mixture"] = {"update": "constant", "heldout_tokens": 32}
    values[stage] |= {"duration": "4 steps", "validation_interval": "2 steps"}
    if stage == "pretrain":
        values["target"] = values["prune"] = None
        values["evaluation"]["baselines"] = []
    run(Recipe.model_validate(values), stages=(stage,))
    looks = [line["losses"] for line in runs.lines(tmp_path / "run", stage) if line.get("event") == "validation"]
    assert looks
    if stage == "prune":
        looks.append(json.loads((tmp_path / "run" / "prune" / "summary.json").read_text())["heldout"]["before_cutting"])
    assert all(losses["letters"] is None and losses["digits"] > 0.0 for losses in looks)


def test_a_step_of_questions_alone_changes_nothing_by_its_loss(tiny_inputs: Path, tmp_path: Path) -> None:
    with_answers(tiny_inputs / "corpus", tmp_path / "corpus", domain="letters", share=0.02)
    recipe = recipe_of(tiny_inputs, tmp_path, steps=6, domains=["letters"])
    data = json.loads(recipe.model_dump_json())
    data["mixture"] |= {"update": "constant"}
    data["pretrain"]["batch_size"] = "2 sequences"
    recipe = Recipe.model_validate(data)
    run(recipe, stages=("pretrain",))
    mixture = RunContext(recipe).initial_mixture()
    labels = [mixture.num_labels(first_sample=2 * step, num_sequences=2) for step in range(6)]
    assert 0 in labels
    assert any(labels)
    lines = [line for line in runs.lines(recipe.run_dir, "pretrain") if "loss" in line]
    assert [line["loss"] == 0.0 for line in lines] == [count == 0 for count in labels]
    assert not any(line.get("skipped") for line in lines)
