"""The command from beginning to end: an ordinary model, its masks and manifest; killed, continued, checked, refused."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import shearing
from shearing.cli.frame import app
from shearing.data.corpus.corpus import Corpus
from shearing.errors import ShearingError
from shearing.files import tensors as tensor_files
from shearing.files.tensors import read_header
from shearing.models.loading import load_config
from shearing.models.stored import saving
from shearing.pruning.calibration.text import load_calibration
from shearing.pruning.sparse import levels, one_shot
from shearing.pruning.sparse.job import Working, disk_bytes, prepare
from shearing.pruning.sparse.levels import allocate
from shearing.pruning.sparse.one_shot import sparsify
from shearing.pruning.sparse.recipe import SparsifyRecipe
from shearing.pruning.sparse.search import msp
from shearing.pruning.sparse.stored.check import differences
from shearing.pruning.sparse.stored.manifest import in_short, read_manifest
from shearing.pruning.sparse.stored.masks import EARLIER_NAME, FILE_NAME, pack, read_masks, unpack
from shearing.pruning.sparse.stored.pruned_layers import PrunedLayers
from shearing.pruning.sparse.stored.trained import masks_beside, write_trained
from shearing.settings.neutral import neutral_keys
from tests.forks import PROCESSES

LAYERS = 4  # of the model of `tiny_inputs`
SECONDS = 120.0


def shear(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def error_of(*arguments: str | Path) -> str:
    result = shear(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


def recipe_of(inputs: Path, output: Path, **settings: Any) -> SparsifyRecipe:
    chosen = {
        "model": str(inputs / "model"),
        "output": output,
        "criterion": "wanda",
        "pattern": "2:4",
        "calibration": [inputs / "corpus"],
        "samples": 12,
        "seqlen": 16,
        "micro_batch_size": 4,
        "device": "cpu",
    }
    chosen |= settings
    return SparsifyRecipe.model_validate({key: value for key, value in chosen.items() if value is not None})


def sparse(inputs: Path, output: Path, **settings: Any) -> Path:
    return sparsify(recipe_of(inputs, output, **settings), console=Console(quiet=True))


@pytest.fixture(scope="module")
def wanda(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model that must not be changed."""
    return sparse(tiny_inputs, tmp_path_factory.mktemp("wanda") / "sparse")


@pytest.fixture
def copied(wanda: Path, tmp_path: Path) -> Path:
    """A sparse model to damage."""
    return Path(shutil.copytree(wanda, tmp_path / "copied"))


def test_every_key_is_either_neutral_or_compared_when_a_run_goes_on(wanda: Path) -> None:
    settings = read_manifest(wanda)["settings"].keys()
    neutral = neutral_keys(SparsifyRecipe)
    assert settings.isdisjoint(neutral)
    assert settings - {"source_files", "calibration_fingerprint"} == SparsifyRecipe.model_fields.keys() - neutral


def test_the_result_is_an_ordinary_model(wanda: Path, tiny_inputs: Path) -> None:
    dense, pruned = load_file(tiny_inputs / "model" / "model.safetensors"), load_file(wanda / "model.safetensors")
    assert dense.keys() == pruned.keys()
    masks = dict(read_masks(wanda / FILE_NAME))
    assert len(masks) == 7 * LAYERS
    for name, weight in pruned.items():
        assert weight.dtype == dense[name].dtype
        expected = dense[name] * masks[name] if name in masks else dense[name]
        assert torch.equal(weight, expected), name
    model = AutoModelForCausalLM.from_pretrained(wanda)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(wanda).encode("ab01") == AutoTokenizer.from_pretrained(
        tiny_inputs / "model"
    ).encode("ab01")
    assert not wanda.with_name("sparse.partial").exists()


def test_the_manifest_says_what_was_done(wanda: Path, tiny_inputs: Path) -> None:
    manifest = read_manifest(wanda)
    assert manifest["convention"] == "N:M means N kept of each M consecutive inputs"
    assert (manifest["criterion"], manifest["reconstruction"], manifest["allocation"]) == ("wanda", "none", "uniform")
    assert (manifest["pattern"], manifest["pattern_in_words"]) == ("2:4", "2 kept of 4")
    assert manifest["budget"]["asked"] == {"kept": "1/2", "sparsity": 0.5}
    assert manifest["budget"]["reached"]["sparsity"] == 0.5
    assert list(manifest["layers"]) == ["0", "1", "2", "3"]
    assert {about["sparsity"] for about in manifest["layers"].values()} == {0.5}
    about = manifest["matrices"]["model.layers.2.self_attn.k_proj.weight"]
    assert about == {"pattern": "2:4", "shape": [16, 32], "zero_before": 0, "kept": 256, "nonzero": 256}
    assert manifest["calibration"] == {
        "source": str(tiny_inputs / "corpus"),
        "fingerprint": manifest["settings"]["calibration_fingerprint"],
        "samples": 12,
        "seqlen": 16,
        "seed": 0,
    }
    assert manifest["files"].keys() == {"model.safetensors", FILE_NAME}
    assert manifest["versions"]["torch"] == torch.__version__


def test_masks_are_bits(wanda: Path) -> None:
    entries, metadata = read_header(wanda / FILE_NAME)
    assert metadata["format"] == "shearing masks 1"
    assert {entry.dtype for entry in entries.values()} == {"U8"}
    assert entries["model.layers.0.mlp.up_proj.weight"].shape == (48 * 32 // 8,)
    assert load_file(wanda / FILE_NAME).keys() == entries.keys()
    for shape in ((3, 5), (1, 1), (8, 2)):
        mask = torch.rand(shape) > 0.5
        assert torch.equal(unpack(pack(mask), shape=shape), mask)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("settings", [{"pattern": "1:4"}, {"pattern": None, "sparsity": 0.29}], ids=["1:4", "0.29"])
def test_criteria_and_patterns(criterion: str, settings: dict[str, Any], tiny_inputs: Path, tmp_path: Path) -> None:
    output = sparse(tiny_inputs, tmp_path / "sparse", criterion=criterion, samples=4, **settings)
    assert differences(output) == []
    manifest = read_manifest(output)
    asked = 0.75 if settings["pattern"] else 0.29
    # Rounded down in each row or matrix.
    assert manifest["budget"]["reached"]["sparsity"] == pytest.approx(asked, abs=1 / 32)
    groups = {"magnitude": "layer", "wanda": "row", "sparsegpt": "layer"}
    assert manifest["pattern"] == (settings["pattern"] or f"{groups[criterion]} 0.29")
    assert manifest["reconstruction"] == ("obs" if criterion == "sparsegpt" else "none")
    assert (manifest["calibration"] is None) == (criterion == "magnitude")


def test_the_dtype_of_the_source_stays(tiny_inputs: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_inputs / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    AutoTokenizer.from_pretrained(tiny_inputs / "model").save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    shutil.copytree(tiny_inputs / "corpus", tmp_path / "corpus")
    output = sparse(tmp_path, tmp_path / "sparse", criterion="sparsegpt")
    assert differences(output) == []
    assert {path.name for path in output.glob("model*")} == {path.name for path in (tmp_path / "model").glob("model*")}
    pruned = AutoModelForCausalLM.from_pretrained(output)
    assert pruned.dtype == torch.bfloat16
    assert pruned.model.layers[0].mlp.up_proj.weight.count_nonzero() == 48 * 32 // 2


def test_a_model_under_other_names_is_converted(
    tiny_inputs: Path, tmp_path: Path, wanda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_inputs, tmp_path / "inputs")
    folder = tmp_path / "inputs" / "model"
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): of for name, of in tensors.items()}, folder / "model.safetensors")

    open_file = saving.opened_in_turn

    @contextlib.contextmanager
    def half_written(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        with open_file(*arguments, **keywords) as write:
            yield write
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(saving, "opened_in_turn", half_written)
        with pytest.raises(ShearingError, match=r"output = .* GB free"):
            sparse(tmp_path / "inputs", tmp_path / "sparse")
    assert not list(tmp_path.rglob("*.writing"))
    output = sparse(tmp_path / "inputs", tmp_path / "sparse")
    assert differences(output) == []
    found, expected = load_file(output / "model.safetensors"), load_file(wanda / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert sparse(tmp_path / "inputs", output) == output


def test_a_full_disk_is_said_of_the_output_and_the_run_continues_later(
    tiny_inputs: Path, wanda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file, saves = tensor_files.save_file, 0

    def full(*arguments: Any, **keywords: Any) -> None:
        nonlocal saves
        saves += 1
        if saves > 2:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(*arguments, **keywords)

    output = tmp_path / "sparse"
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", full)
        with pytest.raises(ShearingError) as caught:
            sparse(tiny_inputs, output)
    assert caught.value.field == "output"
    assert "a disk with room for 0.00 GB: the model, and its layers once more" in str(caught.value)
    assert "checkpoint" not in str(caught.value)
    assert not output.exists()
    blocks = output.with_name("sparse.partial") / "blocks"
    assert sorted(path.name for path in blocks.iterdir()) == ["00000.safetensors", "00001.safetensors"]
    sparse(tiny_inputs, output)
    assert (output / "model.safetensors").read_bytes() == (wanda / "model.safetensors").read_bytes()


def test_include_and_exclude(tiny_inputs: Path, tmp_path: Path) -> None:
    output = sparse(
        tiny_inputs, tmp_path / "sparse", include=["*.mlp.*", "model.layers.0.*"], exclude=["*.down_proj", "*.3.*"]
    )
    names = read_manifest(output)["matrices"]
    assert sorted(name.removeprefix("model.layers.").removesuffix("_proj.weight") for name in names) == [
        "0.mlp.gate", "0.mlp.up", "0.self_attn.k", "0.self_attn.o", "0.self_attn.q", "0.self_attn.v",
        "1.mlp.gate", "1.mlp.up", "2.mlp.gate", "2.mlp.up",
    ]  # fmt: skip
    assert differences(output) == []
    dense, pruned = load_file(tiny_inputs / "model" / "model.safetensors"), load_file(output / "model.safetensors")
    assert all(torch.equal(pruned[name], weight) for name, weight in dense.items() if name not in names)


def test_a_target_that_the_cumulative_rule_misses_is_said(tiny_inputs: Path, tmp_path: Path) -> None:
    options = ["sparsify", tiny_inputs / "model", "--criterion", "magnitude", "--group", "cumulative", "--sparsity"]
    said = shear(*options, "0.99", "-o", tmp_path / "missed").output
    assert "target missed" in said
    assert "of its weights in 28 of 28 matrices" in said
    said = shear(*options, "0.9", "-o", tmp_path / "met").output
    assert "sparsify complete" in said
    assert "target missed" not in said


def test_text_files_are_calibration_too(tiny_inputs: Path, tmp_path: Path) -> None:
    for index, letters in enumerate(("abcd" * 200, "0123" * 100)):
        (tmp_path / f"{index}.txt").write_text(letters)
    files = [tmp_path / "0.txt", tmp_path / "1.txt"]
    output = sparse(tiny_inputs, tmp_path / "sparse", calibration=files)
    assert differences(output) == []
    tokenizer = AutoTokenizer.from_pretrained(tiny_inputs / "model")
    chosen: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": 20, "samples": 20, "seqlen": 16}
    first, again, other = (load_calibration(files, seed=seed, **chosen) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.tokens.shape == (20, 16)
    assert len({tuple(row) for row in first.tokens.tolist()}) >= 2


def test_calibration_rows_of_a_corpus(tiny_inputs: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_inputs / "model")
    chosen: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": 20, "seqlen": 16}
    corpus = [tiny_inputs / "corpus"]
    first, again, other = (load_calibration(corpus, samples=40, seed=seed, **chosen) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len({tuple(row) for row in first.tokens.tolist()}) == 40
    with pytest.raises(ShearingError, match="rows of 16 tokens"):
        load_calibration(corpus, samples=10_000, seed=0, **chosen)


def test_a_corpus_that_is_open_gives_the_same_rows(tiny_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: dict[str, Any] = {"vocab_size": 20, "samples": 40, "seqlen": 16, "seed": 0}
    paths = [tiny_inputs / "corpus"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_inputs / "model")
    opened: list[Corpus] = []
    open_corpus = Corpus.open

    def remembered(*arguments: Any, **checks: Any) -> Corpus:
        opened.append(open_corpus(*arguments, **checks))
        return opened[-1]

    monkeypatch.setattr(Corpus, "open", remembered)
    expected = load_calibration(paths, tokenizer=tokenizer, **chosen)
    assert len(opened) == 1
    found = load_calibration(paths, tokenizer=None, corpus=opened[0], **chosen)
    assert (found.fingerprint, found.source) == (expected.fingerprint, expected.source)
    assert len(opened) == 1


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


def _run(recipe: SparsifyRecipe, *, kill_at: Path | None = None) -> int:
    """Exit code of a process that is killed as soon as a file is there."""
    process = PROCESSES.Process(target=sparsify, args=(recipe,))
    process.start()
    deadline = time.monotonic() + SECONDS
    while process.exitcode is None and time.monotonic() < deadline:
        if kill_at is not None and kill_at.exists():
            process.kill()
            process.join(SECONDS)
        time.sleep(0.0005)  # short beside a write to disk, and the core is left to the run
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize(
    "method", [{"criterion": "sparsegpt"}, {"criterion": "gblm", "reconstruction": "admm_gradual"}], ids=str
)
@pytest.mark.usefixtures("_one_thread")
def test_killed_and_continued_is_the_same_bits(method: dict[str, str], tiny_inputs: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**method, "samples": 32, "micro_batch_size": 2, "offload": "disk"}
    whole = recipe_of(tiny_inputs, tmp_path / "whole", **settings)
    assert _run(whole) == 0
    interrupted = recipe_of(tiny_inputs, tmp_path / "sparse", **settings)
    partial = tmp_path / "sparse.partial"
    places = [partial / "blocks" / f"{layer:05d}.safetensors" for layer in range(LAYERS)]
    kills = 0
    gathered = [partial / "gradients" / "00001.safetensors"] if method["criterion"] == "gblm" else []
    for place in [partial / "settings.json", *gathered, *places[:3], partial / "model" / FILE_NAME]:
        kills += _run(interrupted, kill_at=place) == -signal.SIGKILL
        if (tmp_path / "sparse").exists():
            break
    assert kills >= 2
    assert _run(interrupted) == 0
    assert not partial.exists()
    for name in ("model.safetensors", FILE_NAME):
        assert (tmp_path / "sparse" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    found, expected = (read_manifest(tmp_path / name) for name in ("sparse", "whole"))
    assert {**found, "seconds": None} == {**expected, "seconds": None}
    assert differences(tmp_path / "sparse") == []


@pytest.mark.parametrize("pattern", ["unstructured", "4:8"])
@pytest.mark.parametrize(
    "method",
    [
        ("wanda", "msp", "dsnot"),
        ("sparsegpt", "owl", "admm"),
        ("gblm", "redundancy", "admm_gradual"),
        ("isc", "hessian", "closed_form"),
        ("ria", "rank", "alps"),
    ],
    ids="-".join,
)
def test_any_three_together(method: tuple[str, str, str], pattern: str, tiny_inputs: Path, tmp_path: Path) -> None:
    criterion, allocation, reconstruction = method
    search = {"population": 4, "offspring": 4, "generations": 1, "fitness_samples": 4, "training_steps": 1}
    budget: dict[str, Any] = {"pattern": pattern}
    if pattern == "unstructured":
        budget = {"pattern": None, "sparsity": 0.5, "levels": ["row 0.25", "row 0.5", "row 0.75"]}
    settings = {"criterion": criterion, "allocation": allocation, "reconstruction": reconstruction, "search": search}
    output = sparse(tiny_inputs, tmp_path / "sparse", **settings, **budget)
    manifest = read_manifest(output)
    assert manifest["budget"]["reached"]["sparsity"] == pytest.approx(0.5)
    assert (manifest["criterion"], manifest["reconstruction"], manifest["allocation"]) == (
        criterion,
        reconstruction,
        allocation,
    )
    assert differences(output) == []
    assert not (tmp_path / "sparse.partial").exists()


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_layers_that_are_done_are_not_pruned_again(
    criterion: str, tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny_inputs, tmp_path / "sparse", criterion=criterion)
    module = importlib.import_module("shearing.pruning.sparse.one_shot")
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_output", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sparsify(recipe, console=Console(quiet=True))
    blocks = tmp_path / "sparse.partial" / "blocks"
    assert len(list(blocks.iterdir())) == LAYERS
    (blocks / f"{LAYERS - 1:05d}.safetensors").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in blocks.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_output", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sparsify(recipe, console=Console(quiet=True))
    assert {name: (blocks / name).stat().st_mtime_ns for name in before} == before
    found, expected = (
        load_file(folder / "model.safetensors")
        for folder in (
            sparsify(recipe, console=Console(quiet=True)),
            sparse(tiny_inputs, tmp_path / "whole", criterion=criterion),
        )
    )
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


SEARCHED = {
    "criterion": "sparsegpt",
    "allocation": "msp",
    "pattern": "2:4",
    "search": {"population": 2, "offspring": 2, "generations": 1, "fitness_samples": 2, "starts": []},
}


@pytest.mark.parametrize("num_levels", [4, 2], ids=["levels", "models"])
def test_room_for_a_search_is_wanted_before_anything_is_computed(
    num_levels: int, tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its levels or for the models, whichever take more: the former go before a layer of the latter is written."""
    some = {"levels": ["1:4", "3:4"]} if num_levels == 2 else {}
    recipe = recipe_of(tiny_inputs, tmp_path / "sparse", **SEARCHED, **some)
    job = prepare(recipe, folder=tmp_path / "elsewhere")
    levels_bytes, models_bytes = num_levels * 4 * sum(m.size for m in job.matrices), 2 * job.source.weight_bytes()
    assert len(job.levels) == num_levels
    assert (levels_bytes > models_bytes) == (num_levels == 4)
    assert disk_bytes(job) == max(levels_bytes, models_bytes)
    free = disk_bytes(job) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    for place in (one_shot, levels):
        monkeypatch.setattr(place, "gather", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(msp, "fisher_trace", lambda *_, **__: 1 / 0)
    with pytest.raises(ShearingError, match=f"or before it {num_levels} levels, of which a search chooses") as caught:
        sparsify(recipe, console=Console(quiet=True))
    assert caught.value.field == "output"
    free = levels_bytes - 1
    with pytest.raises(ShearingError, match="until levels are chosen"):
        allocate(recipe.model_copy(update={"output": tmp_path / "a.json"}), console=Console(quiet=True))
    free = disk_bytes(job)
    with pytest.raises(ZeroDivisionError):
        sparsify(recipe, console=Console(quiet=True))


def test_what_gradients_are_computed_from_is_gone_before_models_are_written(tiny_inputs: Path, tmp_path: Path) -> None:
    def needed(**changes: Any) -> int:
        recipe = recipe_of(tiny_inputs, tmp_path / "sparse", criterion="gblm", samples=2, seqlen=8, **changes)
        job = prepare(recipe, folder=tmp_path / "elsewhere")
        kept = 4 * sum(matrix.size for matrix in job.matrices)
        return disk_bytes(job) - kept - 2 * job.source.weight_bytes()

    hidden = load_config(str(tiny_inputs / "model")).hidden_size
    assert needed(offload="cpu") == 0
    assert needed(offload="disk") == 4 * 2 * 8 * hidden
    alone = Working(gradients=3, streams=50, activations=5, levels=20, num_levels=4)
    assert [alone.most(models=size) for size in (0, 30, 60)] == [3 + 50, 3 + 50, 3 + 5 + 60]
    assert alone.parts == {"gradients": 53, "activations": 5, "4 levels to choose from": 20}


def test_levels_go_once_they_are_chosen(tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, partial = recipe_of(tiny_inputs, tmp_path / "sparse", **SEARCHED), tmp_path / "sparse.partial"
    with monkeypatch.context() as patch:
        patch.setattr(one_shot, "prune_layers", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sparsify(recipe, console=Console(quiet=True))
        assert (partial / "allocation.json").is_file()
        assert not (partial / "levels").exists()
        # As of a run that was killed between the two.
        (partial / "levels").mkdir()
        with pytest.raises(ZeroDivisionError):
            sparsify(recipe, console=Console(quiet=True))
        assert not (partial / "levels").exists()
    found = sparsify(recipe, console=Console(quiet=True))
    expected = sparse(tiny_inputs, tmp_path / "whole", **SEARCHED)
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_a_folder_that_was_moved_goes_on(
    tiny_inputs: Path, tmp_path: Path, wanda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run's folder, which has the model that is pruned and what is done of it."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(tiny_inputs, old)
    save, done = PrunedLayers.save, list[int]()

    def interrupted(self: PrunedLayers, layer: int, matrices: Any, *, facts: Any) -> None:
        if done == [0, 1]:
            done.clear()
            raise KeyboardInterrupt
        save(self, layer, matrices, facts=facts)
        done.append(layer)

    monkeypatch.setattr(PrunedLayers, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sparse(old, old / "sparse", criterion="sparsegpt")
    old.rename(new)
    found = sparse(new, new / "sparse", criterion="sparsegpt")
    assert done == [2, 3]
    monkeypatch.undo()
    expected = sparse(tiny_inputs, tmp_path / "whole", criterion="sparsegpt")
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    # A finished one is known again too, though it says where it was made.
    new.rename(old)
    sparse(old, old / "sparse", criterion="sparsegpt")
    with pytest.raises(ShearingError, match="source_files was"):
        sparse(tiny_inputs, old / "sparse", criterion="sparsegpt", model=str(wanda))


def test_other_settings_do_not_continue(tiny_inputs: Path, tmp_path: Path) -> None:
    partial = tmp_path / "sparse.partial"
    partial.mkdir()
    recipe = recipe_of(tiny_inputs, tmp_path / "sparse")
    (tmp_path / "first").mkdir()
    done = sparse(tiny_inputs, tmp_path / "first" / "sparse")
    (partial / "settings.json").write_text(json.dumps(read_manifest(done)["settings"] | {"seed": 3}))
    with pytest.raises(ShearingError, match="seed was 3 and is 0"):
        sparsify(recipe, console=Console(quiet=True))


def test_what_is_complete_is_left_alone(copied: Path, tiny_inputs: Path) -> None:
    before = (copied / "model.safetensors").stat().st_mtime_ns
    sparse(tiny_inputs, copied)
    assert (copied / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ShearingError, match="samples was 12 and is 13"):
        sparse(tiny_inputs, copied, samples=13)


@pytest.mark.parametrize(
    ("settings", "heading"),
    [
        ({}, "magnitude, depth, 50 %"),  # of 31 levels
        ({"levels": ["row 0.25", "row 0.5", "row 0.75"]}, "magnitude mixed row 0.75, row 0.5, row 0.25"),
    ],
)
def test_the_heading_of_a_column_is_short(
    settings: dict[str, Any], heading: str, tiny_inputs: Path, tmp_path: Path
) -> None:
    shared_out = {"criterion": "magnitude", "pattern": None, "sparsity": 0.5, "allocation": "depth"}
    output = sparse(tiny_inputs, tmp_path / "sparse", **shared_out, **settings)
    assert in_short(read_manifest(output)) == heading


def test_evaluation_puts_dense_beside_sparse(copied: Path, tiny_inputs: Path) -> None:
    console = Console(record=True, width=120, file=io.StringIO())
    sparsify(recipe_of(tiny_inputs, copied, evaluate=tiny_inputs / "corpus", evaluate_tokens=64), console=console)
    text = console.export_text()
    for heading in ("dense", "wanda 2:4", "share not zero", "MB not zero", "perplexity", "letters", "16 tokens"):
        assert heading in text
    evaluation = json.loads((copied / "evaluation.json").read_text())
    assert list(evaluation["models"]) == ["dense", "wanda 2:4"]
    dense, pruned = evaluation["models"].values()
    assert dense["nonzero"] == dense["parameters"] > pruned["nonzero"]
    assert pruned["nonzero_bytes"] == 4 * pruned["nonzero"]
    kept = read_manifest(copied)["budget"]["reached"]
    assert dense["nonzero"] - pruned["nonzero"] == kept["of"] - kept["kept"]


def test_bytes_are_those_of_the_files_whatever_computes(tiny_inputs: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_inputs / "model", dtype=torch.bfloat16)
    shutil.copytree(tiny_inputs / "model", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    output = tmp_path / "sparse"
    values = {"model": str(tmp_path / "model"), "evaluate": tiny_inputs / "corpus", "evaluate_tokens": 64}
    sparsify(recipe_of(tiny_inputs, output, precision="fp32", **values), console=Console(quiet=True))
    for each in json.loads((output / "evaluation.json").read_text())["models"].values():
        assert each["nonzero_bytes"] == 2 * each["nonzero"]


def _flip(path: Path, tensor: str, *, bit: int) -> None:
    entries, _ = read_header(path)
    content = bytearray(path.read_bytes())
    content[entries[tensor].begin + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_check_finds_nothing_wrong(wanda: Path) -> None:
    result = shear("sparsify", "--check", wanda)
    assert result.exit_code == 0, result.output
    assert "is what its manifest says" in result.stdout


def test_check_finds_a_flipped_bit_of_a_weight(copied: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    removed = int((~dict(read_masks(copied / FILE_NAME))[name]).flatten().nonzero()[7])
    _flip(copied / "model.safetensors", name, bit=32 * removed + 20)
    result = shear("sparsify", "--check", copied)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "model.safetensors: its SHA-256 is not the manifest's",
        f"{name}: 1 weights that the mask removes are not zero",
    ]


def test_check_finds_a_flipped_bit_of_a_kept_weight(copied: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    kept = int(dict(read_masks(copied / FILE_NAME))[name].flatten().nonzero()[7])
    _flip(copied / "model.safetensors", name, bit=32 * kept)
    assert differences(copied) == ["model.safetensors: its SHA-256 is not the manifest's"]


def test_check_finds_a_flipped_bit_of_a_mask(copied: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    removed = int((~dict(read_masks(copied / FILE_NAME))[name]).flatten().nonzero()[7])
    _flip(copied / FILE_NAME, name, bit=removed // 8 * 8 + 7 - removed % 8)
    found = differences(copied)
    assert found[0] == f"{FILE_NAME}: its SHA-256 is not the manifest's"
    assert f"{name}: its mask is not 2:4" in found


def test_check_names_what_is_missing_or_cut_short(copied: Path) -> None:
    manifest = json.loads((copied / "sparsity.json").read_text())
    manifest["matrices"]["model.layers.0.mlp.up_proj.weight"]["kept"] -= 1
    (copied / "sparsity.json").write_text(json.dumps(manifest))
    found = differences(copied)
    assert "sparsity.json: the matrices do not add up to budget.reached" in found
    assert any(line.startswith("model.layers.0.mlp.up_proj.weight: its mask keeps 768") for line in found)
    (copied / FILE_NAME).write_bytes((copied / FILE_NAME).read_bytes()[:-5])
    assert any("bytes are missing at its end" in line for line in differences(copied))
    (copied / FILE_NAME).unlink()
    assert f"{FILE_NAME}: missing" in differences(copied)


def test_a_folder_of_an_earlier_version_opens_and_what_is_trained_of_it_has_the_new_name(
    copied: Path, wanda: Path, tmp_path: Path
) -> None:
    (copied / FILE_NAME).rename(copied / EARLIER_NAME)
    manifest = (copied / "sparsity.json").read_text()
    (copied / "sparsity.json").write_text(manifest.replace(FILE_NAME, EARLIER_NAME))
    assert differences(copied) == []
    assert masks_beside(copied) == copied / EARLIER_NAME
    trained = tmp_path / "trained"
    trained.mkdir()
    shutil.copyfile(copied / "model.safetensors", trained / "model.safetensors")
    write_trained(trained, source=copied, record={})
    assert differences(trained) == []
    assert masks_beside(trained) == trained / FILE_NAME
    assert (trained / FILE_NAME).read_bytes() == (wanda / FILE_NAME).read_bytes()
    assert read_manifest(trained)["files"].keys() == {"model.safetensors", FILE_NAME}


def test_check_needs_a_sparse_model(tiny_inputs: Path) -> None:
    assert "no sparsity.json" in error_of("sparsify", "--check", tiny_inputs / "model")


def test_the_command_and_a_recipe_file_do_the_same(tiny_inputs: Path, tmp_path: Path, wanda: Path) -> None:
    options = ["--calibration", tiny_inputs / "corpus", "--samples", "12", "--seqlen", "16"]
    result = shear(
        "sparsify", tiny_inputs / "model", "micro_batch_size=4", "--criterion", "wanda", "--pattern", "2:4",
        *options, "-o", tmp_path / "a",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "2:4: 2 kept of 4" in result.stdout
    file = tmp_path / "sparse.yaml"
    file.write_text(
        f"model: {tiny_inputs / 'model'}\noutput: {tmp_path / 'b'}\ncriterion: wanda\npattern: '2:4'\n"
        f"calibration: [{tiny_inputs / 'corpus'}]\nsamples: 3\nseqlen: 16\nmicro_batch_size: 4\n"
    )
    result = shear("sparsify", file, "samples=5", "--samples", "12")
    assert result.exit_code == 0, result.output
    for name in ("a", "b"):
        assert (tmp_path / name / FILE_NAME).read_bytes() == (wanda / FILE_NAME).read_bytes()
    assert shearing.SparsifyRecipe is SparsifyRecipe
    assert shearing.sparsify is sparsify


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--pattern", "2:4"], ["criterion", "missing"]),
        (["--criterion", "wandas", "--pattern", "2:4"], ["criterion", "did you mean wanda?"]),
        (["--criterion", "magnitude"], ["sparsity", "pattern: 2:4"]),
        (["--criterion", "wanda", "--sparsity", "0.5"], ["calibration", "say on which text"]),
        (["--criterion", "magnitude", "--pattern", "4:2"], ["override --pattern 4:2", "N kept of each M"]),
        (["--criterion", "magnitude", "--pattern", "5:10"], ["5 kept of 10", "32 inputs of model.layers.0.self_attn"]),
        (["--criterion", "magnitude", "--pattern", "1:4", "--sparsity", "0.5"], ["0.75, which is what 1:4 removes"]),
        (["--criterion", "magnitude", "--pattern", "2:4", "--group", "row"], ["group", "unset with an N:M pattern"]),
        (["--criterion", "magnitude", "--sparsity", "1.5"], ["sparsity", "less than 1"]),
        (["--criterion", "magnitude", "--sparsity", "0.5", "--include", "lm_head"], ["embedding and head are never"]),
        (["--criterion", "magnitude", "--sparsity", "0.5", "--exclude", "*_proj"], ["leave something to prune"]),
        (["--criterion", "wanda", "--sparsity", "0.5", "--calibration", "absent.txt"], ["absent.txt", "files of text"]),
        (["--criterion", "magnitude", "--sparsity", "0.5", "--seqlen", "100"], ["seqlen", "at most 64"]),
    ],
)  # fmt: skip
def test_bad_input(arguments: list[str], parts: list[str], tiny_inputs: Path, tmp_path: Path) -> None:
    message = error_of("sparsify", tiny_inputs / "model", *arguments, "-o", tmp_path / "sparse")
    for part in parts:
        assert part in message, message
    assert not (tmp_path / "sparse").exists()


def test_more_bad_input(tiny_inputs: Path, tmp_path: Path) -> None:
    arguments = ["--criterion", "magnitude", "--sparsity", "0.5", "-o"]
    assert "config.json" in error_of("sparsify", tiny_inputs, *arguments, tmp_path / "sparse")
    (tmp_path / "taken").mkdir()
    assert "does not exist yet" in error_of("sparsify", tiny_inputs / "model", *arguments, tmp_path / "taken")
    message = error_of(
        "sparsify", tiny_inputs / "model", "--criterion", "sparsegpt", "--sparsity", "0.5", "--group", "cumulative",
        "--calibration", tiny_inputs / "corpus", "--samples", "4", "--seqlen", "16", "-o", tmp_path / "sparse",
    )  # fmt: skip
    assert "see whole rows first" in message
    message = error_of(
        "sparsify", tiny_inputs / "model", "--criterion", "wanda", "--sparsity", "0.5",
        "--calibration", tiny_inputs / "model", "-o", tmp_path / "sparse",
    )  # fmt: skip
    assert "the folder that holds corpus.json" in message
    message = error_of(
        "sparsify", tiny_inputs / "model", *arguments, tmp_path / "sparse", "--evaluate", tmp_path / "absent"
    )
    assert "error: evaluate" in message
    shutil.copytree(tiny_inputs / "model", tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")

    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    message = error_of("sparsify", tmp_path / "nan", *arguments, tmp_path / "sparse")
    assert "parameter model.layers.3.mlp.up_proj.weight" in message
