"""Runs that listen to a teacher: what is refused before they start, what they learn from, and that they continue."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from shearing.errors import CombinedShearingError, ShearingError
from shearing.evaluation.heldout import heldout_loss
from shearing.models.loading import load_source
from shearing.runs.context import RunContext
from shearing.runs.planning.preflight import preflight
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import Stage
from shearing.runs.stages.compact import compact
from shearing.runs.stages.pretrain import pretrain
from shearing.runs.stages.prune import prune
from shearing.runs.stages.sparsify import sparsify
from shearing.training.checkpoints.state import read_state
from shearing.training.metrics import TIMING_FIELDS
from shearing.training.stage import Interrupted
from tests.conftest import tiny_recipe_data
from tests.training import tasks

STEPS = 8
MIXTURE = {"reference": "teacher", "losses": "training", "interval": "2 steps", "pretrain_interval": "2 steps"}


def _recipe(inputs: Path, run_dir: Path, *, mixture: dict[str, Any] | None = None, **distill: Any) -> Recipe:
    data = tiny_recipe_data(inputs, run_dir=run_dir)
    for stage in ("prune", "pretrain"):
        data[stage] |= {"duration": f"{STEPS} steps", "checkpoint_interval": "3 steps"}
    data["mixture"] |= mixture or {}
    data["distill"] = {"weight": 0.7, **distill}
    return Recipe.model_validate(data)


def _quiet(recipe: Recipe) -> RunContext:
    return RunContext(recipe, console=Console(file=io.StringIO()))


def _lines(run_dir: Path, stage: Stage) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING_FIELDS} for line in lines]


@pytest.fixture(scope="module")
def teacher(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model, trained on the corpus: it knows more than one that begins."""
    data = tiny_recipe_data(tiny_inputs, run_dir=tmp_path_factory.mktemp("teacher") / "run")
    data |= {"target": None, "prune": None}
    data["pretrain"] |= {"duration": "40 steps", "learning_rate": 1e-2, "batch_size": "8 sequences"}
    recipe = Recipe.model_validate(data)
    pretrain(_quiet(recipe))
    return str(recipe.run_dir / "model")


def _lines_of_both(
    stage: Stage,
    function: Callable[[RunContext], Any],
    *,
    whole: Recipe,
    parts: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> list[dict[str, Any]]:
    """The metrics of a stage that was not interrupted; of one that was, and continued, they are the same."""
    function(_quiet(whole))
    with monkeypatch.context() as patch:
        tasks.stop_at(5, patch=patch)
        with pytest.raises(Interrupted):
            function(_quiet(parts))
    function(_quiet(parts))
    lines = _lines(whole.run_dir, stage)
    assert _lines(parts.run_dir, stage) == lines
    return lines


def test_both_stages_listen_and_are_continued_bit_for_bit(
    teacher: str, tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trust by domain and the mixture's reference are of the steps before: both have to be in checkpoints."""
    settings = {"mixture": MIXTURE, "teacher": teacher, "domains": "auto", "margin": 2.0, "skip_low_entropy": 0.2}
    settings["hidden"] = {"decay": "75%"}
    whole, parts = (_recipe(tiny_inputs, tmp_path / name, **settings) for name in ("whole", "parts"))
    for stage, function in (("prune", prune), ("pretrain", pretrain)):
        lines = _lines_of_both(stage, function, whole=whole, parts=parts, monkeypatch=monkeypatch)
        steps = [line for line in lines if "event" not in line]
        weights = [set(line["domain_teacher_weights"].values()) for line in steps]
        assert len(set.union(*weights)) > 3, "trust moves"
        assert all(value > 0.01 for line in steps for value in line["domain_hidden_errors"].values())
        # The reference of an update is the teacher's mean loss of the text since the last one, and so are the losses.
        for update in (line for line in lines if line.get("event") == "mixture"):
            since = [line for line in steps if update["step"] - 2 < line["step"] <= update["step"]]
            for name, figure in (("losses", "domain_losses"), ("reference", "domain_teacher_losses")):
                for domain, found in update[name].items():
                    counts = [line["domain_tokens"].get(domain, 0) for line in since]
                    sums = [line[figure].get(domain, 0) * count for line, count in zip(since, counts, strict=True)]
                    assert found == pytest.approx(sum(sums) / sum(counts))
        last = f"checkpoints/step-{STEPS:08d}/shard-00000-of-00001.safetensors"
        expected, found = (load_file(tmp_path / name / stage / last) for name in ("whole", "parts"))
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        if stage == "prune":
            for recipe in (whole, parts):
                compact(_quiet(recipe))


def test_what_is_above_the_teacher_is_averaged_over_both_stages(
    teacher: str, tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"mixture": {**MIXTURE, "update": "robust"}, "teacher": teacher, "domains": "all"}
    whole, parts = (_recipe(tiny_inputs, tmp_path / name, **settings) for name in ("whole", "parts"))
    excess: dict[str, float] = {}
    for stage, function in (("prune", prune), ("pretrain", pretrain)):
        lines = _lines_of_both(stage, function, whole=whole, parts=parts, monkeypatch=monkeypatch)
        for update in (line for line in lines if line.get("event") == "mixture"):
            for domain, loss in update["losses"].items():
                newest = loss - update["reference"][domain]
                excess[domain] = 0.9 * excess.get(domain, newest) + 0.1 * newest
        for name in ("whole", "parts"):
            kept = read_state(tmp_path / name / stage / "checkpoints" / f"step-{STEPS:08d}", "state")["mixture_rule"]
            assert kept["excess"] == pytest.approx(excess, rel=1e-9)
        if stage == "prune":
            for recipe in (whole, parts):
                compact(_quiet(recipe))
    assert len(excess) == 2


def test_the_teacher_is_the_source_as_it_was(tiny_inputs: Path, tmp_path: Path) -> None:
    """In mask learning, after a refit, and in training of a sparse model: its loss stays that of the source."""
    data = tiny_recipe_data(tiny_inputs, run_dir=tmp_path / "sparse")
    sparse = {**data, "target": None, "prune": None, "sparsify": {"criterion": "magnitude", "sparsity": 0.5}}
    sparse["distill"] = {"weight": 0.5, "domains": "all"}
    sparse = Recipe.model_validate(sparse)
    sparsify(_quiet(sparse))
    pretrain(_quiet(sparse))
    masked = _recipe(tiny_inputs, tmp_path / "masked", domains="all")
    prune(_quiet(masked))
    source = load_source(str(tiny_inputs / "model"))
    for recipe, stage in ((sparse, "pretrain"), (masked, "prune")):
        context = _quiet(recipe)
        batch = context.initial_mixture().batch(first_sample=0, num_sequences=2)
        with torch.no_grad():
            logits = source(batch.tokens[:, :-1]).logits.log_softmax(-1)
        losses = -logits.gather(2, batch.tokens[:, 1:, None])[..., 0].mean(1)
        line = _lines(recipe.run_dir, stage)[0]
        for index, domain in enumerate(context.corpus.domains):
            if (of_domain := losses[batch.domain_ids == index]).numel():
                assert line["domain_teacher_losses"][domain] == pytest.approx(of_domain.mean().item(), rel=1e-5)


def test_listening_brings_the_student_nearer_to_the_teacher(tiny_inputs: Path, tmp_path: Path) -> None:
    losses = {}
    for weight in (0.0, 1.0):
        recipe = _recipe(tiny_inputs, tmp_path / f"{weight}", weight=weight, domains="all")
        recipe = recipe.model_copy(update={"target": None, "prune": None})
        context = _quiet(recipe)
        pretrain(context)
        model = load_source(str(context.directory.model))
        measured = {"split": "test", "tokens_per_domain": 64, "sequence_length": 16, "micro_batch_size": 2}
        losses[weight] = heldout_loss(model, context.corpus, **measured)
        lines = _lines(recipe.run_dir, "pretrain")
        # The source beside itself: what is away from it, it comes back to.
        last = max(value for line in lines[-2:] for value in line.get("domain_divergences", {"": 0.0}).values())
        assert last < 1e-6 if weight else last > 1e-4
    assert all(losses[0.0][domain].loss < losses[1.0][domain].loss for domain in losses[0.0])


def test_a_teacher_in_host_memory_says_the_same(tiny_inputs: Path, tmp_path: Path) -> None:
    losses = []
    for placement in ("replicate", "offload"):
        recipe = _recipe(tiny_inputs, tmp_path / placement, placement=placement, hidden={})
        recipe = recipe.model_copy(update={"target": None, "prune": None})
        pretrain(_quiet(recipe))
        losses.append(_lines(recipe.run_dir, "pretrain"))
    assert losses[0] == losses[1]


def test_matching_draws_the_cut_model_to_the_teachers_stream(tiny_inputs: Path, tmp_path: Path) -> None:
    """Each layer and dimension to its own: to any others it would not come nearer than it begins."""
    errors: dict[float, tuple[float, float]] = {}
    for weight in (1e-6, 2.0):
        run_dir = tmp_path / f"{weight}"
        recipe = _recipe(tiny_inputs, run_dir, weight=0.0, domains="all", hidden={"weight": weight})
        longer = {"duration": "24 steps", "learning_rate": 1e-2, "optimizer": "fresh"}
        recipe = Recipe.model_validate(recipe.model_dump() | {"pretrain": recipe.pretrain.model_dump() | longer})
        if errors:
            shutil.copytree(tmp_path / f"{1e-6}", run_dir, ignore=shutil.ignore_patterns("pretrain"))
        else:
            prune(_quiet(recipe))
            compact(_quiet(recipe))
        pretrain(_quiet(recipe))
        lines = [line for line in _lines(run_dir, "pretrain") if "event" not in line]
        first, last = (
            [value for line in some for value in line["domain_hidden_errors"].values()]
            for some in (lines[:4], lines[-4:])
        )
        errors[weight] = (sum(first) / len(first), sum(last) / len(last))
    assert errors[2.0][1] < 0.7 * errors[2.0][0]
    assert errors[2.0][1] < 0.7 * errors[1e-6][1]


def _copy(inputs: Path, folder: Path) -> Path:
    shutil.copytree(inputs / "model", folder)
    return folder


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _another_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"a"', '"A"'))


def _not_finite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: _config(folder, vocab_size=99), "a vocabulary of 99 tokens"),
        (lambda folder: _config(folder, quantization_config={"quant_method": "bitsandbytes"}), "quantised"),
        (lambda folder: _config(folder, max_position_embeddings=8), "8 positions"),
        (lambda folder: _config(folder, model_type="gpt2"), "gpt2"),
        (_another_tokenizer, "another tokenizer"),
        (_not_finite, "NaN or infinity"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
)
def test_a_teacher_of_no_use_is_refused_before_work_starts(
    damage: Callable[[Path], object], said: str, tiny_inputs: Path, tmp_path: Path
) -> None:
    folder = _copy(tiny_inputs, tmp_path / "teacher")
    preflight(_quiet(_recipe(tiny_inputs, tmp_path / "run", teacher=str(folder))))
    damage(folder)
    with pytest.raises(ShearingError, match=said) as raised:
        preflight(_quiet(_recipe(tiny_inputs, tmp_path / "run", teacher=str(folder))))
    assert not isinstance(raised.value, CombinedShearingError)
    assert raised.value.field.startswith("distill.teacher")


def test_streams_are_matched_with_the_source_or_what_came_of_it(
    teacher: str, tiny_inputs: Path, tmp_path: Path
) -> None:
    preflight(_quiet(_recipe(tiny_inputs, tmp_path / "run", teacher=teacher, hidden={})))
    folder = _copy(tiny_inputs, tmp_path / "teacher")
    _config(folder, num_hidden_layers=3)
    tensors = load_file(folder / "model.safetensors")
    fewer = {name: tensor for name, tensor in tensors.items() if ".layers.3." not in name}
    save_file(fewer, folder / "model.safetensors", metadata={"format": "pt"})
    preflight(_quiet(_recipe(tiny_inputs, tmp_path / "run", teacher=str(folder))))
    with pytest.raises(ShearingError, match="3 layers") as raised:
        preflight(_quiet(_recipe(tiny_inputs, tmp_path / "run", teacher=str(folder), hidden={})))
    assert raised.value.field == "distill.hidden"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"domains": ["letters", "digit"]}, "distill.domains"),
        ({"domains": {"digit": 0.5}}, "distill.domains"),
        ({"kind": "top_k", "top_k": 64}, "distill.top_k"),
        ({"hidden": {"layers": [0, 4]}}, "distill.hidden.layers"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], field: str, tiny_inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ShearingError) as raised:
        preflight(_quiet(_recipe(tiny_inputs, tmp_path / "run", **settings)))
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"distill": None}, "mixture.reference"),
        ({"mixture": {**MIXTURE, "losses": "heldout"}}, "mixture.losses"),
        ({"distill": {"domains": []}}, "distill.domains"),
        ({"distill": {"top_k": 5}}, "distill.top_k"),
        ({"distill": {"margin": 0.5, "domains": "all"}}, "distill.margin"),
        ({"distill": {"cache_missing": "compute"}}, "distill.cache_missing"),
        ({"distill": {"revision": "main"}}, "distill.revision"),
        ({"distill": {"kind": "cosine"}}, "distill.kind"),
        ({"distill": {"hidden": {"layers": []}}}, "distill.hidden.layers"),
        ({"distill": {"hidden": {}}, "training": {"compile": True}}, "training.compile"),
    ],
)
def test_contradictions_are_found_in_the_recipe(
    changes: dict[str, Any], field: str, tiny_inputs: Path, tmp_path: Path
) -> None:
    data = tiny_recipe_data(tiny_inputs, run_dir=tmp_path / "run")
    data["mixture"] |= MIXTURE
    data = {**data, "distill": {}, **changes}
    with pytest.raises(ValueError, match=field.rpartition(".")[2]):
        Recipe.model_validate(data)
