"""A run that goes on with other keys where it is: what was before stays, what comes is the new recipe's, to the bit."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shearing.cli.frame import app
from shearing.errors import ShearingError
from shearing.files.durable import read_json
from shearing.runs.context import RunContext
from shearing.runs.continuation import extension
from shearing.runs.continuation.changes import changes_of
from shearing.runs.continuation.extension import change, extend
from shearing.runs.recipe import Recipe, load_recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.heldout import steering_tokens
from shearing.runs.stages.run import report, run
from shearing.settings.quantities import Duration
from shearing.training.checkpoints.checkpoints import checkpoints_in
from shearing.training.learning_rates import LearningRates
from shearing.training.metrics import TIMING_FIELDS
from tests.conftest import tiny_recipe_data
from tests.forks import start_shear


def recipe_of(inputs: Path, folder: Path, **pretrain: Any) -> Recipe:
    """Seven steps of pretraining at one rate, unless said otherwise; domain weights change after steps 4 and 8."""
    data = tiny_recipe_data(inputs, run_dir=folder / "run")
    del data["target"], data["prune"]
    data["mixture"] |= {"pretrain_interval": "4 steps"}
    data["pretrain"] |= {"duration": 7, "schedule": "constant", "warmup": 2, "checkpoint_interval": 3, **pretrain}
    return Recipe.model_validate(data)


@pytest.fixture(scope="module")
def trained(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run, with checkpoints of steps 6 and 7; only copied."""
    return run(recipe_of(tiny_inputs, tmp_path_factory.mktemp("trained")), stages=["pretrain", "evaluate"])


@pytest.fixture
def own(trained: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A copy of it."""
    copy = RunDirectory(tmp_path / "own")
    shutil.copytree(trained.path, copy.path)
    text = trained.recipe.read_text().replace(str(trained.path), str(copy.path))
    copy.recipe.write_text(text)
    return copy


def lines_of(directory: RunDirectory) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in directory.metrics("pretrain").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


def assert_same(found: RunDirectory, expected: RunDirectory) -> None:
    assert lines_of(found) == lines_of(expected)
    assert found.read_complete("pretrain") == expected.read_complete("pretrain")
    for name in ("model/model.safetensors", *(f"pretrain/checkpoints/step-{step:08d}" for step in (12,))):
        paths = [each.path / name for each in (found, expected)]
        files = [[path] if path.is_file() else sorted(path.glob("shard-*")) for path in paths]
        assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_a_finished_run_that_goes_on_is_the_longer_run(
    own: RunDirectory, trained: RunDirectory, tiny_inputs: Path, tmp_path: Path
) -> None:
    made = change(own, overrides=["pretrain.duration=12 steps"])
    assert (made.step, made.total_steps) == (7, 12)
    process = start_shear(["pretrain", own.recipe], output=tmp_path / "killed.log")
    ninth = own.checkpoints("pretrain") / "step-00000009"
    until = time.monotonic() + 120
    while not ninth.exists() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert ninth.exists(), (tmp_path / "killed.log").read_text()
    run(load_recipe(own.recipe), stages=["pretrain"])
    assert_same(own, run(recipe_of(tiny_inputs, tmp_path / "long", duration=12), stages=["pretrain"]))
    # What it was before is kept.
    for kept, was in (("model-step-00000007/model.safetensors", "model/model.safetensors"),):
        assert (own.path / kept).read_bytes() == (trained.path / was).read_bytes()
    assert read_json(own.path / "evaluation-step-00000007.json") == read_json(trained.evaluation)
    assert "final" not in read_json(own.evaluation)["models"]
    assert read_json(own.pretrain / "complete-step-00000007.json") == trained.read_complete("pretrain")


def test_domain_weights_follow_the_text_that_the_reference_was_measured_on(tiny_inputs: Path, tmp_path: Path) -> None:
    """What `auto` means depends on the interval, which may change; the source has read what it meant at first."""
    data = recipe_of(tiny_inputs, tmp_path).model_dump(mode="json")
    data["data"]["sequence_length"] = 4
    recipe = Recipe.model_validate(data | {"mixture": {"pretrain_interval": "3 steps"}})
    short = run(recipe, stages=["pretrain"])
    assert read_json(short.pretrain / "reference_tokens.json") == {"tokens_per_domain": 4}
    change(short, overrides=["pretrain.duration=40", "mixture.pretrain_interval=40 steps"])
    context = RunContext(load_recipe(short.recipe))
    assert context.recipe.heldout_tokens(domains=2) > 4
    assert steering_tokens(context) == 4
    branch = extend(short, to=tmp_path / "new", overrides=["pretrain.duration=40"], onward=True)
    assert steering_tokens(RunContext(load_recipe(branch.directory.recipe))) == 4
    # A run of a version that did not write it down, and one whose measurement was killed, go by the recipe.
    for name in ("reference_tokens.json", "reference.json"):
        kept = short.pretrain / name
        kept.rename(tmp_path / name)
        assert steering_tokens(context) == context.recipe.heldout_tokens(domains=2)
        (tmp_path / name).rename(kept)


def test_another_rate_holds_from_its_step_on(
    own: RunDirectory, tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is a run whose rates are put together of both from the start."""
    change(own, overrides=["pretrain.duration=12", "pretrain.learning_rate=3e-4", "pretrain.schedule=cosine"])
    run(load_recipe(own.recipe), stages=["pretrain"])
    assert changes_of(own)[0].keys == {
        "pretrain.duration": ("7 steps", "12 steps"),
        "pretrain.learning_rate": (1e-3, 3e-4),
        "pretrain.schedule": ("constant", "cosine"),
    }
    before, now = recipe_of(tiny_inputs, tmp_path / "x"), load_recipe(own.recipe)
    old, new = (each.learning_rates("pretrain") for each in (before, now))
    piecewise = [*(old.at(step) for step in range(7)), *(new.at(step) for step in range(7, 12))]
    monkeypatch.setattr(LearningRates, "at", lambda _, step: piecewise[step])
    oracle = run(recipe_of(tiny_inputs, tmp_path / "oracle", duration=12), stages=["pretrain"])
    assert [line["learning_rate"] for line in lines_of(own) if "learning_rate" in line] == piecewise
    assert_same(own, oracle)


def test_what_a_step_asks_for_may_change_and_a_branch_keeps_the_other_run(
    trained: RunDirectory, tmp_path: Path
) -> None:
    keys = ["pretrain.duration=9", "pretrain.weight_decay=0.1", "pretrain.betas=[0.8, 0.9]"]
    made = extend(trained, to=tmp_path / "new", step=6, overrides=keys, onward=True)
    assert made.step == 6
    assert [each.step for each in changes_of(made.directory)] == [6]
    assert not list(made.directory.pretrain.glob("complete*"))
    run(load_recipe(made.directory.recipe), stages=["pretrain"])
    assert lines_of(made.directory)[:7] == lines_of(trained)[:7]  # six steps and an update
    assert lines_of(made.directory)[7]["loss"] == lines_of(trained)[7]["loss"]  # of the weights before the step
    assert trained.is_complete("pretrain")
    assert not trained.changes.exists()


def test_it_ends_in_a_decay_where_it_is(own: RunDirectory) -> None:
    made = change(own, decay=Duration(steps=3))
    assert (made.step, made.total_steps) == (7, 10)
    rates = load_recipe(own.recipe).learning_rates("pretrain")
    assert [rates.at(step) for step in (7, 9)] == pytest.approx([1e-3, 4e-4])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seed=1"], r"^seed = 1\n  allowed: 0, with which the run began"),
        (["data.sequence_length=8"], r"^data\.sequence_length = 8\n  allowed: 16"),
        (["pretrain.batch_size=4"], r"^pretrain\.batch_size = '4 sequences'\n  allowed: 2 sequences"),
        (["model.source=other"], r"^model\.source"),
        (["mixture.update=constant", "pretrain.lora={}"], r"mixture\.update = 'constant'(.|\n)*pretrain\.lora"),
        (
            ["pretrain.learning_rate=3e-4"],
            r"newest checkpoint: it is of step 7, and(.|\n)*pretrain\.duration='14 steps'",
        ),
        (["run_dir=elsewhere", "pretrain.duration=9"], "run_dir"),
    ],
)
def test_what_would_change_the_past_is_refused(overrides: list[str], said: str, own: RunDirectory) -> None:
    before = {path: path.read_bytes() for path in own.path.rglob("*") if path.is_file()}
    with pytest.raises(ShearingError, match=said):
        change(own, overrides=overrides)
    assert {path: path.read_bytes() for path in own.path.rglob("*") if path.is_file()} == before


def test_a_kill_in_between_leaves_one_run_or_the_other(own: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extension, "write_text", kill)
        with pytest.raises(KeyboardInterrupt):
            change(own, overrides=["pretrain.duration=9"])
    assert changes_of(own) == []
    elsewhere = extend(own, to=own.path.with_name("elsewhere"), overrides=["pretrain.duration=12"])
    assert changes_of(elsewhere.directory) == []
    shutil.copytree(own.path, own.path.with_name("again"))
    run(load_recipe(own.recipe), stages=["pretrain"])  # the run that it was is whole again
    report(own)
    assert "pretrain.duration from" not in own.report.read_text()
    # Or it is extended at once, which is as if nobody had been killed.
    own.path.rename(own.path.with_name("whole"))
    own.path.with_name("again").rename(own.path)
    change(own, overrides=["pretrain.duration=9"])
    run(load_recipe(own.recipe), stages=["pretrain"])
    assert own.read_complete("pretrain")["steps"] == 9
    assert (own.path / "model-step-00000007").is_dir()
    shutil.rmtree(own.path)
    own.path.with_name("whole").rename(own.path)
    change(own, overrides=["pretrain.duration=12"])
    assert [each.keys for each in changes_of(own)] == [{"pretrain.duration": ("7 steps", "12 steps")}]
    change(own, overrides=["pretrain.duration=8"])
    assert [each.keys["pretrain.duration"] for each in changes_of(own)] == [
        ("7 steps", "12 steps"),
        ("12 steps", "8 steps"),
    ]


def test_a_run_that_was_moved_goes_on_in_the_folder_that_is_named(own: RunDirectory, tmp_path: Path) -> None:
    own.path.rename(tmp_path / "moved")
    here = RunDirectory(tmp_path / "moved")
    made = change(here, overrides=["pretrain.duration=8", f"run_dir={here.path}"])
    run(load_recipe(made.directory.recipe), stages=["pretrain"])
    assert here.read_complete("pretrain")["steps"] == 8
    assert here.model.is_dir()
    assert not own.path.exists()


def test_no_step_is_computed_again_with_other_keys(own: RunDirectory) -> None:
    change(own, overrides=["pretrain.duration=9"])
    shutil.rmtree(checkpoints_in(own.checkpoints("pretrain"))[7])
    with pytest.raises(ShearingError, match=r"newest whole checkpoint is of step 6'\n  allowed: one of step 7"):
        run(load_recipe(own.recipe), stages=["pretrain"])


def test_a_damaged_checkpoint_is_said_to_be_one(own: RunDirectory) -> None:
    for checkpoint in checkpoints_in(own.checkpoints("pretrain")).values():
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(
        ShearingError, match=r"undamaged checkpoint; those of continued pretraining are of steps 6, 7\n"
    ):
        change(own, overrides=["pretrain.duration=9"])


def test_the_run_says_what_changed(own: RunDirectory) -> None:
    first = load_recipe(own.recipe)
    ours = load_recipe(own.recipe, overrides=["pretrain.duration=9"])
    with pytest.raises(ShearingError, match=rf"shear extend {own.path} 'pretrain\.duration=9 steps'"):
        run(ours, stages=["pretrain"])
    with pytest.raises(ShearingError, match=r"learning_rate=0\.0003 'pretrain\.duration=14 steps'$"):
        run(load_recipe(own.recipe, overrides=["pretrain.learning_rate=3e-4"]), stages=["pretrain"])
    with pytest.raises(ShearingError, match=r"to continue that run$"):
        run(load_recipe(own.recipe, overrides=["pretrain.duration=6"]), stages=["pretrain"])
    said = CliRunner().invoke(app, ["extend", str(own.path), "pretrain.duration=9"])
    assert (
        said.stdout
        == f"{own.path}: step 7 of 9 of pretrain; it goes on by its own recipe\nshear run {own.path}/recipe.yaml\n"
    )
    report(own)
    assert "pretrain.duration from 7 steps to 9 steps" in own.report.read_text()
    with pytest.raises(
        ShearingError, match=rf"by its own recipe: shear run {own.recipe}; to change more of it: shear extend"
    ):
        run(first, stages=["pretrain"])
    run(ours, stages=["pretrain"])
    asked = CliRunner().invoke(app, ["extend", str(own.path), "--from", "6"])
    assert "--from" in asked.output
