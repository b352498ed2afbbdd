"""A run that goes on from a checkpoint of another one is the run that had its recipe from the start, bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from shearing.cli.frame import app
from shearing.errors import ShearingError
from shearing.runs.continuation.extension import extend
from shearing.runs.recipe import Recipe, load_recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.run import run
from shearing.settings.quantities import Duration
from shearing.training.checkpoints.checkpoints import checkpoints_in
from shearing.training.metrics import TIMING_FIELDS
from tests.conftest import tiny_recipe_data

STAGES = ("prune", "compact", "pretrain")


def recipe_of(inputs: Path, folder: Path, **pretrain: Any) -> Recipe:
    """Stable for 8 of 12 steps of pretraining, unless said otherwise."""
    data = tiny_recipe_data(inputs, run_dir=folder / "run")
    data["prune"] |= {"duration": 3, "freeze": 1}
    data["mixture"] |= {"pretrain_interval": "25%"}
    data["pretrain"] |= {
        "duration": 12,
        "schedule": "wsd",
        "warmup": "25%",
        "decay": 4,
        "keep_last": 1,
        "keep_every": 5,
        **pretrain,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    return load_recipe(folder / "tiny.yaml")


@pytest.fixture(scope="module")
def trained(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Checkpoints of steps 5, 8 (before the decay), 10 and 12."""
    return run(recipe_of(tiny_inputs, tmp_path_factory.mktemp("trained")), stages=STAGES)


def from_start(recipe: Recipe, *, pruned: RunDirectory) -> RunDirectory:
    """The run of a recipe, but for mask learning and the cut, which are another run's."""
    for stage in ("prune", "compact"):
        shutil.copytree(pruned.folder(stage), RunDirectory(recipe.run_dir).folder(stage))
    return run(recipe, stages=["pretrain"])


def every_third(recipe: Recipe) -> Recipe:
    """The same with an update of domain weights every three steps, whatever its length."""
    mixture = recipe.mixture.model_copy(update={"pretrain_interval": Duration(steps=3)})
    return recipe.model_copy(update={"mixture": mixture})


def lines_of(directory: RunDirectory) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in directory.metrics("pretrain").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


def assert_same(found: RunDirectory, expected: RunDirectory) -> None:
    assert lines_of(found) == lines_of(expected)
    weights = [(each.model / "model.safetensors").read_bytes() for each in (found, expected)]
    assert weights[0] == weights[1]
    assert found.read_complete("pretrain") == expected.read_complete("pretrain")


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("step", "decay", "overrides", "first", "as_if"),
    [
        # In steps, as shares of another length would be others: 3 of warm-up, 3 between updates of the mixture.
        (None, 4, [], 8, {"duration": 12, "decay": 4}),
        (5, 3, [], 5, {"duration": 8, "decay": 3}),
        (None, None, ["pretrain.duration=14"], 8, {"duration": 14, "decay": 4}),
        (5, None, ["pretrain.duration=9", "pretrain.schedule=constant"], 5, {"duration": 9, "schedule": "constant"}),
        (None, 3, ["pretrain.final_learning_rate=0.0"], 8, {"duration": 11, "decay": 3, "final_learning_rate": 0.0}),
    ],
)
def test_an_extension_is_the_run_from_the_start(
    step: int | None,
    decay: int | None,
    overrides: list[str],
    first: int,
    as_if: dict[str, Any],
    trained: RunDirectory,
    tiny_inputs: Path,
    tmp_path: Path,
) -> None:
    before = hashes(trained.path)
    made = extend(
        trained,
        to=tmp_path / "new",
        step=step,
        decay=None if decay is None else Duration(steps=decay),
        overrides=overrides,
    )
    assert made.step == first
    assert made.total_steps == as_if["duration"]
    assert list(checkpoints_in(made.directory.checkpoints("pretrain"))) == [first]
    run(load_recipe(made.directory.recipe), stages=["pretrain"])
    recipe = every_third(recipe_of(tiny_inputs, tmp_path, warmup=3, **as_if))
    assert_same(made.directory, from_start(recipe, pruned=trained))
    assert hashes(trained.path) == before


def test_one_schedule_is_extended_across_the_cut(tiny_inputs: Path, tmp_path: Path) -> None:
    def recipe(folder: Path, *, decay: int, duration: int) -> Recipe:
        data = tiny_recipe_data(tiny_inputs, run_dir=folder / "run")
        rates = {"schedule": "wsd", "warmup": 5, "decay": decay}
        data |= {"one_schedule": True}
        data["prune"] |= {**rates, "duration": 4, "freeze": 1}
        data["pretrain"] |= {**rates, "duration": duration}
        return Recipe.model_validate(data)

    long = run(recipe(tmp_path / "long", decay=3, duration=8), stages=STAGES)
    made = extend(long, to=tmp_path / "new", decay=Duration(steps=2))
    assert (made.step, made.total_steps) == (5, 7)
    run(load_recipe(made.directory.recipe), stages=["pretrain"])
    assert_same(made.directory, run(recipe(tmp_path / "short", decay=2, duration=7), stages=STAGES))


def test_what_was_stable_is_kept_whatever_else_goes(trained: RunDirectory) -> None:
    assert list(checkpoints_in(trained.checkpoints("pretrain"))) == [5, 8, 10, 12]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"decay": Duration(fraction=0.2)}, "--decay"),
        ({"decay": Duration(steps=0)}, "--decay"),
        ({"step": 4}, r"are of steps 5, 8, 10, 12, the decay begins after step 8"),
        ({"step": 10, "overrides": ["pretrain.duration=20"]}, "--from"),
        ({"overrides": ["pretrain.duration=5", "pretrain.decay=1"]}, "RUN_DIR"),
        ({"overrides": ["pretrain.duration=20", "pretrain.warmup=4"]}, "RUN_DIR"),
        ({"overrides": ["seed=1"]}, r"^seed = 1"),
        ({"overrides": ["pretrain.batch_size=4"]}, r"^pretrain\.batch_size"),
        ({"overrides": ["pretrain.decay=12"]}, r"together with pretrain\.warmup = 3 steps"),
    ],
)
def test_what_would_be_no_extension_is_refused(
    keys: dict[str, Any], said: str, trained: RunDirectory, tmp_path: Path
) -> None:
    with pytest.raises(ShearingError, match=said):
        extend(trained, to=tmp_path / "new", **keys)
    assert not any(tmp_path.iterdir())


def test_a_weight_that_falls_with_the_length_of_the_run_is_refused(trained: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(trained.path, tmp_path / "old")
    old = RunDirectory(tmp_path / "old")
    recipe = load_recipe(old.recipe)
    for decay, refused in (("50%", True), ("6 steps", False)):
        distill = {"hidden": {"decay": decay}}
        old.recipe.write_text(Recipe.model_validate(recipe.model_dump() | {"distill": distill}).to_yaml())
        if refused:
            with pytest.raises(ShearingError, match=r"distill\.hidden\.decay"):
                extend(old, to=tmp_path / "new", decay=Duration(steps=4))
        else:
            assert extend(old, to=tmp_path / "new", decay=Duration(steps=4)).step == 8


def test_a_weight_that_follows_the_height_of_another_schedule_is_refused(trained: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(trained.path, tmp_path / "old")
    old = RunDirectory(tmp_path / "old")
    data = load_recipe(old.recipe).model_dump()
    data["pretrain"] |= {"schedule": "cosine", "final_learning_rate": 1.0}  # a rate that no length changes
    for schedule in ("learning_rate", "constant"):
        old.recipe.write_text(Recipe.model_validate(data | {"distill": {"schedule": schedule}}).to_yaml())
        if schedule == "learning_rate":
            with pytest.raises(ShearingError, match="RUN_DIR"):
                extend(old, to=tmp_path / "new", overrides=["pretrain.duration=20"])
        else:
            assert extend(old, to=tmp_path / "new", overrides=["pretrain.duration=20"]).step > 3


def test_folders_that_cannot_be_are_refused(trained: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ShearingError, match="NEW_DIR"):
        extend(trained, to=trained.path, decay=Duration(steps=1))
    with pytest.raises(ShearingError, match="RUN_DIR"):
        extend(RunDirectory(tmp_path), to=tmp_path / "new", decay=Duration(steps=1))
    (tmp_path / "file").touch()
    with pytest.raises(ShearingError, match="is a file: choose another NEW_DIR"):
        extend(trained, to=tmp_path / "file" / "new", decay=Duration(steps=1))


def test_a_damaged_checkpoint_is_passed_over(trained: RunDirectory, tmp_path: Path) -> None:
    copy = RunDirectory(tmp_path / "copy")
    shutil.copytree(trained.path, copy.path)
    shard = next(checkpoints_in(copy.checkpoints("pretrain"))[8].glob("shard-*.safetensors"))
    shard.write_bytes(b"\0" * shard.stat().st_size)
    assert extend(copy, to=tmp_path / "new", decay=Duration(steps=2)).step == 5


def test_the_command_says_how_it_goes_on(trained: RunDirectory, tmp_path: Path) -> None:
    new = tmp_path / "new"
    said = CliRunner().invoke(app, ["extend", str(trained.path), str(new), "name=branch", "--decay", "2 steps"])
    assert said.exit_code == 0
    assert said.stdout == (
        f"{new}: step 8 of 10 of pretrain, from {trained.path}; it goes on by its own recipe\n"
        f"shear run {new}/recipe.yaml\n"
    )
    assert load_recipe(new / "recipe.yaml").name == "branch"


@pytest.mark.parametrize(("duration", "first"), [(6, 6), (7, 5), (8, 5)])
def test_updates_that_the_end_left_out_are_made(
    duration: int, first: int, trained: RunDirectory, tiny_inputs: Path, tmp_path: Path
) -> None:
    """Domain weights that hold two steps later are of no use near the end, but they are to a longer run."""

    def recipe(folder: Path, duration: int) -> Recipe:
        return every_third(recipe_of(tiny_inputs, folder, duration=duration, schedule="constant", warmup=3))

    short = from_start(recipe(tmp_path / "short", duration), pruned=trained)
    assert first in checkpoints_in(short.checkpoints("pretrain"))
    made = extend(short, to=tmp_path / "new", overrides=["pretrain.duration=12"])
    # Behind the last step of 6 it is made up for; behind 6 of 7 or 8 the model is gone.
    assert made.step == first
    run(load_recipe(made.directory.recipe), stages=["pretrain"])
    expected = from_start(recipe(tmp_path / "long", 12), pruned=trained)
    assert [line["step"] for line in lines_of(expected) if line.get("event") == "mixture"] == [3, 6, 9]
    assert_same(made.directory, expected)


def test_a_checkpoint_that_does_not_say_what_was_left_out_is_passed_over(
    trained: RunDirectory, tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shearing.training.callbacks.save_checkpoints._left", lambda run: run.unfinished)
    recipe = every_third(recipe_of(tiny_inputs, tmp_path / "old", duration=6, schedule="constant"))
    old = from_start(recipe, pruned=trained)
    assert extend(old, to=tmp_path / "new", overrides=["pretrain.duration=12"]).step == 5


def steady(inputs: Path, folder: Path, *, duration: int, **pretrain: Any) -> dict[str, Any]:
    """A source that is trained on at one rate, with a checkpoint every other step."""
    data = tiny_recipe_data(inputs, run_dir=folder / "run")
    data["target"] = data["prune"] = None
    data["mixture"] = {"update": "constant"}
    rate = {"schedule": "constant", "warmup": "0 steps"}
    data["pretrain"] |= {"duration": duration, **rate, "checkpoint_interval": 2, "keep_last": 9, **pretrain}
    return data


def sparse_recipe(inputs: Path, folder: Path, *, duration: int, **ast: Any) -> Recipe:
    """Masks of the sparse source that move."""
    data = steady(inputs, folder, duration=duration, ast={"decay": 0.05, **ast})
    data["sparsify"] = {"criterion": "magnitude", "pattern": "2:4"}
    return Recipe.model_validate(data)


@pytest.mark.parametrize(
    ("overrides", "first", "freeze"), [([], 4, 2), (["pretrain.ast.freeze=6"], 8, 6)], ids=["as it was", "rests on"]
)
def test_masks_that_move_do_so_as_in_the_run_from_the_start(
    overrides: list[str], first: int, freeze: int, tiny_inputs: Path, tmp_path: Path
) -> None:
    shares = {"interval": "25%", "ramp": "50%", "freeze": "25%"}
    stages = ("sparsify", "pretrain")
    short = run(sparse_recipe(tiny_inputs, tmp_path / "short", duration=8, **shares), stages=stages)
    made = extend(short, to=tmp_path / "new", overrides=["pretrain.duration=12", *overrides])
    # From step 6 on masks stay, and what they had set aside is gone: of no use where they go on moving.
    assert made.step == first
    run(load_recipe(made.directory.recipe), stages=["pretrain"])
    steps = {"interval": "2 steps", "ramp": "4 steps", "freeze": f"{freeze} steps"}
    long = run(sparse_recipe(tiny_inputs, tmp_path / "long", duration=12, **steps), stages=stages)
    assert_same(made.directory, long)
    with pytest.raises(ShearingError, match=r"(?s)from step 6 on masks stay.*set pretrain\.ast\.freeze"):
        extend(short, to=tmp_path / "none", step=6, overrides=["pretrain.duration=12"])


def test_the_look_at_layers_that_the_end_left_out_is_made(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(folder: Path, *, duration: int, interval: str) -> Recipe:
        lora = {"rank": 2, "targets": ["q_proj", "v_proj"]}
        ist = {"layers": 0.5, "rate": 100.0, "tokens": 32, "pairs": 2, "interval": interval}
        own = {"validation_interval": None, "lora": lora, "ist": ist}
        return Recipe.model_validate(steady(tiny_inputs, folder, duration=duration, **own))

    short = run(recipe(tmp_path / "short", duration=6, interval="50%"), stages=["pretrain"])
    made = extend(short, to=tmp_path / "new", overrides=["pretrain.duration=10"])
    assert made.step == 6
    run(load_recipe(made.directory.recipe), stages=["pretrain"])
    long = run(recipe(tmp_path / "long", duration=10, interval="3 steps"), stages=["pretrain"])
    assert [line["step"] for line in lines_of(long) if line.get("event") == "layers"] == [3, 6, 9]
    assert_same(made.directory, long)
    # One of a version that does not say so is passed over.
    monkeypatch.setattr("shearing.runs.continuation.extension.left_in", lambda _: ())
    assert extend(short, to=tmp_path / "older", overrides=["pretrain.duration=10"]).step == 4
