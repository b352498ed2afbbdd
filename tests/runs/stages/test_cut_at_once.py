"""A recipe whose `prune` has no steps: units are chosen by their scores and the rest refitted, all at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import shearing
from shearing.errors import ShearingError
from shearing.files.durable import read_json
from shearing.models.shape import Shape
from shearing.runs.context import RunContext
from shearing.runs.launch import require_equal_shares
from shearing.runs.planning.hardware import Hardware
from shearing.runs.planning.plan import plan
from shearing.runs.stages.choices import Source
from shearing.runs.stages.evaluation.recipe import Baseline

AT_ONCE = "prune.duration=0 steps"


def test_what_is_cut_at_once_is_the_refitted_baseline(tiny_recipe: Path) -> None:
    """What a run cuts is bit for bit what the baseline of its metric is, and training starts there."""
    recipe = shearing.load_recipe(tiny_recipe, overrides=[AT_ONCE])
    shearing.run(recipe)
    context = RunContext(recipe)
    run = context.directory
    cut = AutoModelForCausalLM.from_pretrained(run.compact)
    shape = Shape.of(cut.config)
    wanted = Source(context).cut(Baseline(metric="reconstruction", refitted=True), target=shape)
    for (name, have), want in zip(cut.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0, msg=name)
    summary = read_json(run.prune / "summary.json")
    assert summary["steps"] == summary["tokens"] == 0
    assert not any(summary["changed_from_start"].values())
    lines = [json.loads(line) for line in run.metrics("pretrain").read_text().splitlines()]
    steps = [line for line in lines if "event" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    page = run.report.read_text()
    assert "<dt>mask learning</dt><dd>no steps: cut at once</dd>" in page
    assert "units were cut at once" in page
    assert "learned yet" not in page
    models = read_json(run.evaluation)["models"]
    assert models["compact"]["label"] == "chosen by reconstruction, refitted"
    assert models["final"]["label"] == "chosen by reconstruction, refitted, pretrained"
    assert "changed_from_start" not in models["compact"]


def test_moments_of_no_step_are_a_fresh_optimiser(tiny_recipe: Path) -> None:
    finals = []
    for optimizer in ("carried", "fresh"):
        run_dir = tiny_recipe.parent / optimizer
        overrides = [AT_ONCE, f"run_dir={run_dir}", f"pretrain.optimizer={optimizer}"]
        shearing.run(shearing.load_recipe(tiny_recipe, overrides=overrides))
        finals.append(AutoModelForCausalLM.from_pretrained(run_dir / "model").state_dict())
    for name, value in finals[0].items():
        torch.testing.assert_close(value, finals[1][name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("prune.initial_masks=open", r"prune\.duration = '0 steps'\n.*prune\.initial_masks other than open"),
        ("prune.masks=staged", r"prune\.duration = '0 steps'\n.*prune\.masks=learned"),
        ("prune.sparsity_warmup=2 steps", r"prune\.sparsity_warmup"),
        ("pretrain.duration=0 steps", r"pretrain\.duration"),
    ],
)
def test_what_no_steps_cannot_do_is_said(tiny_recipe: Path, override: str, said: str) -> None:
    with pytest.raises(ShearingError, match=said):
        shearing.load_recipe(tiny_recipe, overrides=[AT_ONCE, override])


def test_no_steps_do_not_say_how_much_text_updates_read(tiny_recipe: Path) -> None:
    long = ["mixture.heldout_tokens=auto", "pretrain.duration=400 steps", "mixture.pretrain_interval=100 steps"]
    at_once = shearing.load_recipe(tiny_recipe, overrides=[*long, AT_ONCE])
    alone = shearing.load_recipe(tiny_recipe, overrides=[*long, "prune=null", "target=null"])
    # A token that is read takes a third of one of a step: a tenth of 100 steps of 32 tokens, for two domains.
    assert at_once.heldout_tokens(domains=2) == alone.heldout_tokens(domains=2) == 3 * 10 * 32 // 2


def test_a_batch_that_is_never_dealt_need_not_be_shared(tiny_recipe: Path) -> None:
    pretrain = ["pretrain.batch_size=3 sequences", "pretrain.micro_batch_size=1"]
    recipe = shearing.load_recipe(tiny_recipe, overrides=[AT_ONCE, *pretrain])
    require_equal_shares(recipe, num_processes=3)
    with pytest.raises(ShearingError, match=r"prune\.batch_size = '2 sequences'"):
        require_equal_shares(shearing.load_recipe(tiny_recipe, overrides=pretrain), num_processes=3)
    made = plan(recipe, hardware=Hardware.of(processes=3, gpu=None, gigabytes=80, mfu=0.4))
    assert [stage.workload.micro_batch_size for stage in made.stages] == [2, 1]


def test_moments_do_not_go_into_another_basis(tiny_recipe: Path) -> None:
    with pytest.raises(
        ShearingError, match=r"prune\.moments_of = 'before'\n.*the basis of their training\n.*prune\.rotate=none"
    ):
        shearing.load_recipe(tiny_recipe, overrides=[AT_ONCE, "prune.rotate=pca", "prune.moments_of=before"])


def test_what_a_refit_has_found_is_said(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [AT_ONCE, "prune.refit_ridge=auto", "prune.block_refit={steps: 4, learning_rate: 1e-3}"]
    run = shearing.run(shearing.load_recipe(tiny_recipe, overrides=overrides), stages=["prune", "compact"])
    said = " ".join(capsys.readouterr().out.split())
    assert "ridges by held-out rows" in said
    assert "what blocks' outputs lack" in said
    assert read_json(run.compact / "shape.json")["relative_logit_difference"] < 1e-5


def test_steps_of_blocks_need_a_refit(tiny_recipe: Path) -> None:
    overrides = [AT_ONCE, "prune.compensate=false", "prune.block_refit={steps: 1}"]
    with pytest.raises(ShearingError, match=r"prune\.block_refit = '1 steps'\n.*prune\.compensate"):
        shearing.load_recipe(tiny_recipe, overrides=overrides)


@pytest.mark.parametrize("tied", ["untie", "diagonal"])
def test_a_rotated_source_is_cut_in_the_basis_it_was_first_rotated_into(tiny_recipe: Path, tied: str) -> None:
    """Interrupted after the rotation, a run goes on in the same coordinates; the cut model is the masked one."""
    overrides = [AT_ONCE, "prune.rotate=pca", f"prune.rotate_tied={tied}", "training.precision=fp32"]
    recipe = shearing.load_recipe(tiny_recipe, overrides=overrides)
    run = shearing.run(recipe, stages=["prune", "compact"])
    plain = shearing.load_recipe(tiny_recipe, overrides=[AT_ONCE, f"run_dir={tiny_recipe.parent / 'plain'}"])
    assert read_json(run.compact / "shape.json")["relative_logit_difference"] < 1e-5
    weights = load_file(run.compact / "model.safetensors")
    of_plain = load_file(shearing.run(plain, stages=["prune", "compact"]).compact / "model.safetensors")
    assert sorted(weights.keys() - of_plain.keys()) == (["lm_head.weight"] if tied == "untie" else [])
    parameters = read_json(run.compact / "shape.json")["target"]["parameters"]
    assert parameters == sum(weight.numel() for weight in weights.values())
    assert any(not weights[name].equal(of_plain[name]) for name in of_plain)
    for left in (run.compact, run.checkpoints("prune"), run.complete("prune"), run.prune / "masks.safetensors"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    shearing.run(recipe, stages=["prune", "compact"])
    again = load_file(run.compact / "model.safetensors")
    assert all(weights[name].equal(again[name]) for name in weights)
    if tied == "untie":
        shearing.run(recipe)
        models = read_json(run.evaluation)["models"]
        assert models["final"]["parameters"] == parameters > models["random"]["parameters"]


def test_a_tied_source_is_not_rotated_unless_the_recipe_says_how(tiny_recipe: Path) -> None:
    recipe = shearing.load_recipe(tiny_recipe, overrides=[AT_ONCE, "prune.rotate=pca"])
    with pytest.raises(ShearingError, match=r"prune\.rotate = .*head that is the embedding"):
        shearing.run(recipe)
    assert not (recipe.run_dir / "prune").exists()


def test_a_rotation_and_streams_by_dimension_do_not_go_together(tiny_recipe: Path) -> None:
    overrides = [AT_ONCE, "prune.rotate=pca", "distill.hidden.weight=1.0"]
    with pytest.raises(ShearingError, match=r"prune\.rotate = 'pca'"):
        shearing.load_recipe(tiny_recipe, overrides=overrides)
