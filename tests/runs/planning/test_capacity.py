"""What GPUs cannot hold is refused before it is loaded, with what to type instead; and idle ones are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shearing.errors import ShearingError
from shearing.runs.context import RunContext
from shearing.runs.planning.capacity import Capacity, Devices, capacity
from shearing.runs.planning.preflight import preflight
from shearing.runs.recipe import Recipe, load_recipe
from tests.cli.test_cli import error_of, shear
from tests.repository import ROOT
from tests.runs.planning.test_plan import CASCADE, LLAMA_2_7B, sheared_llama

ZERO_2 = ("training.engine=deepspeed", "training.deepspeed.zero_stage=2")
TINY = Devices(name="A100", memory=1000, count=2)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Override that makes a folder with nothing but Llama 2 7B's config the source."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return f"model.source={tmp_path / 'llama'}"


def _found(recipe: Recipe, *, processes: int, gigabytes: float, count: int = 8) -> Capacity:
    devices = Devices(name="NVIDIA A100-SXM4-80GB", memory=int(gigabytes * 1e9), count=count)
    return capacity(recipe, stages=recipe.stages, processes=processes, devices=devices)


def test_a_7b_model_on_one_of_eight_gpus_is_refused_with_all_of_them_to_mend(source: str) -> None:
    found = _found(sheared_llama(source, "training.engine=torch"), processes=1, gigabytes=80)
    assert found.unfit is not None
    assert "a step of prune takes 1" in found.unfit.allowed
    assert "80.0 GB of one GPU" in found.unfit.allowed
    assert "training.engine=deepspeed" in found.unfit.mend
    assert "--gpus 8" in found.unfit.mend
    assert "idle: 7 of this machine's 8 GPUs; --gpus 8 starts a process on each of 8" in found.notes


def test_what_fits_needs_no_word(source: str) -> None:
    assert _found(sheared_llama(source, *ZERO_2), processes=8, gigabytes=80) == Capacity(unfit=None, notes=[])


def test_an_evaluation_leaves_the_others_idle_without_a_word(source: str) -> None:
    devices = Devices(name="A100", memory=80 * 10**9, count=8)
    assert capacity(sheared_llama(source), stages=["evaluate"], processes=1, devices=devices).notes == []


def test_where_every_process_holds_all_the_whole_model_is_loaded(source: str) -> None:
    found = _found(sheared_llama(source, "training.engine=torch"), processes=8, gigabytes=24)
    assert found.unfit is not None
    assert "loading for prune takes 27.0 GB" in found.unfit.allowed
    assert "training.engine=deepspeed" in found.unfit.mend


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_where_weights_are_shared_out_a_layer_is_loaded(engine: str, source: str) -> None:
    sharded = ["training.deepspeed.zero_stage=3", f"training.engine={engine}"]
    found = _found(sheared_llama(source, *sharded), processes=8, gigabytes=1.5)
    assert found.unfit is not None
    # Embedding, head and a layer of Llama-2-7B, in fp32.
    assert "loading for prune takes 1.9 GB" in found.unfit.allowed
    assert "a layer, what is outside of layers and a teacher are not shared out" in found.unfit.mend
    assert "loading" not in str(_found(sheared_llama(source, *sharded), processes=8, gigabytes=2.5))


@pytest.mark.parametrize(("placement", "refused"), [("replicate", True), ("offload", False)])
def test_a_teacher_in_host_memory_is_not_loaded_onto_the_gpu(placement: str, refused: bool, source: str) -> None:
    """Of 139 GB of Llama-2-70B in bf16 only what is outside of its layers gets there."""
    distill = f"distill={{teacher: {ROOT / 'recipes/sources/llama-2-70b'}, placement: {placement}}}"
    sharded = ["training.engine=deepspeed", "training.deepspeed.zero_stage=3"]
    micro = ["prune.micro_batch_size=1", "pretrain.micro_batch_size=1"]
    found = _found(sheared_llama(source, *sharded, *micro, distill), processes=8, gigabytes=80)
    assert ("loading for prune takes 139." in str(found.unfit)) == refused
    assert (found.unfit is not None) == refused


def test_who_chooses_weights_has_all_of_them(source: str, tmp_path: Path) -> None:
    """Of 1.3B weights and what is outside of layers once more, in fp32; gradients and sums of the layers' matrices."""
    speft = ["training.engine=fsdp2", f"run_dir={tmp_path}", "pretrain.speft={}"]

    def found(gigabytes: float, *overrides: str) -> Capacity:
        devices = Devices(name="A100", memory=int(gigabytes * 1e9), count=8)
        return capacity(sheared_llama(source, *speft, *overrides), stages=["pretrain"], processes=8, devices=devices)

    unfit = found(18).unfit
    assert unfit is not None
    assert "choosing weights for pretrain takes 18.3 GB" in unfit.allowed
    assert "loading" not in unfit.allowed
    assert "pretrain.speft.salience=magnitude" in unfit.mend
    assert found(19).unfit is None
    assert found(11, "pretrain.speft.salience=magnitude").unfit is None
    unfit = found(5, "pretrain.speft.salience=magnitude").unfit
    assert unfit is not None
    assert "salience" not in unfit.mend
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "salient.safetensors").touch()  # they were chosen before
    assert found(18).unfit is None


def test_every_run_of_a_cascade_has_to_fit(source: str) -> None:
    """The first target is trained on too, and takes more than the last."""
    alone = sheared_llama(source, *ZERO_2)
    through = sheared_llama(source, *ZERO_2, CASCADE)
    assert _found(alone, processes=8, gigabytes=36).unfit is None
    found = _found(through, processes=8, gigabytes=36).unfit
    assert found is not None
    assert "a step of pretrain of sheared-llama-1.3b-step-1 takes" in found.allowed
    assert "a step of prune" not in found.allowed


def test_what_is_tight_and_what_can_be_done_elsewhere_are_only_said(source: str) -> None:
    whole = sheared_llama(source, *ZERO_2, "evaluation.placement=replicate")
    found = _found(whole, processes=8, gigabytes=34)
    assert found.unfit is None
    tight, evaluation = (
        next(note for note in found.notes if note.startswith(start)) for start in ("tight", "perhaps too large")
    )
    assert "a step of prune takes 33.7 GB of 34.0 GB" in tight
    assert "evaluation takes 40." in evaluation
    # Unless the recipe says so, no process has all of what is judged where a GPU cannot hold it.
    shared = _found(sheared_llama(source, *ZERO_2), processes=8, gigabytes=34)
    assert not any("evaluation" in note for note in shared.notes)


@pytest.mark.parametrize("override", ["training.compile=true", "pretrain.lora={}"])
def test_what_takes_less_than_is_counted_is_not_refused(source: str, override: str) -> None:
    recipe = sheared_llama(source, "training.engine=torch", override)
    stages = ["pretrain"]
    devices = Devices(name="A100", memory=int(25e9), count=1)
    found = capacity(recipe, stages=stages, processes=1, devices=devices)
    assert found.unfit is None
    assert any(note.startswith("perhaps too large: a step of pretrain") for note in found.notes)


def test_preflight_refuses_unless_the_recipe_wants_to_try(tiny_recipe: Path) -> None:
    with pytest.raises(ShearingError, match="loading for prune takes") as error:
        preflight(RunContext(load_recipe(tiny_recipe)), devices=TINY)
    assert error.value.field == "training.engine"
    assert "training.memory_check=warn" in error.value.mend
    tried = load_recipe(tiny_recipe, overrides=["training.memory_check=warn"])
    assert preflight(RunContext(tried), devices=TINY).notes[0].startswith("too large: ")
    # A recipe that is only looked at may be meant for another machine.
    looked_at = preflight(RunContext(load_recipe(tiny_recipe)), devices=TINY, starts=False)
    assert looked_at.notes[0].startswith("too large: ")
    assert not any(note.startswith("idle") for note in looked_at.notes)


def test_without_gpus_nothing_is_said(tiny_recipe: Path) -> None:
    assert preflight(RunContext(load_recipe(tiny_recipe))).notes == []


def test_a_run_says_what_it_leaves_idle(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Devices, "here", lambda _: Devices(name="A100", memory=80 * 10**9, count=3))
    result = shear("prune", tiny_recipe)
    assert result.exit_code == 0, result.output
    # Two sequences a step: three processes cannot share them.
    assert "idle: 2 of this machine's 3 GPUs; --gpus 2 starts a process on each of 2" in result.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpus", "many"], "all, or a number from 1"),
        (["--gpus", "0"], "all, or a number from 1"),
        (["--gpus", "3"], "prune.batch_size"),
        (["--gpus", "2", "training.device=auto"], "1 to 1, the GPUs of this machine"),
    ],
)
def test_a_number_of_processes_that_cannot_be(arguments: list[str], expected: str, tiny_recipe: Path) -> None:
    assert expected in error_of("prune", tiny_recipe, *arguments)


def test_a_launcher_has_already_said_how_many(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "without a launcher" in error_of("prune", tiny_recipe, "--gpus", "1")
