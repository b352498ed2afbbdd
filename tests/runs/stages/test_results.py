"""What a run leaves behind: folders that open wherever their source did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from shearing.files.tensors import read_header
from shearing.objectives.objective import PARAMETER_PREFIX
from shearing.pruning.sparse.stored.check import differences
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.run import run
from shearing.training.checkpoints.pieces import WEIGHT, ShardedState
from tests.conftest import tiny_recipe_data
from tests.models.stored.test_spellings import LLAMA3

BESIDE = {
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "README.md",
    "LICENSE",
}


def decorated(model: Path, folder: Path) -> Path:
    """A copy as the hub has models: RoPE in the names of version 4, and files that saving would not give back."""
    shutil.copytree(model, folder)
    said = json.loads((folder / "config.json").read_text())
    del said["rope_parameters"]
    said |= {"rope_theta": 500_000.0, "rope_scaling": LLAMA3, "torch_dtype": said.pop("dtype")}
    said["torch_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(said))
    weights = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # Sampling settings that generation would not use, as some models have them: nothing here takes offence.
    (folder / "generation_config.json").write_text('{"temperature": 0.3,\n\n"do_sample": false}')
    (folder / "additional_chat_templates").mkdir()
    for name in BESIDE:
        if not (folder / name).exists():
            (folder / name).write_bytes(f"of the source: {name}".encode())
    of_tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    of_tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast", "left_by": "another version"}
    (folder / "tokenizer_config.json").write_text(json.dumps(of_tokenizer))
    return folder


def recipe_data(inputs: Path, *, source: Path, run_dir: Path) -> dict[str, Any]:
    data = tiny_recipe_data(inputs, run_dir=run_dir)
    data["model"]["source"] = str(source)
    data["sparsify"] = {"criterion": "magnitude", "pattern": "2:4"}
    return data


@pytest.fixture(scope="module")
def source(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decorated(tiny_inputs / "model", tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def directory(tiny_inputs: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with every stage that writes a model."""
    run_dir = tmp_path_factory.mktemp("run") / "all"
    recipe = Recipe.model_validate(recipe_data(tiny_inputs, source=source, run_dir=run_dir))
    return run(recipe, stages=("prune", "compact", "sparsify", "pretrain"))


def trained(directory: RunDirectory) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint."""
    last = max(directory.checkpoints("pretrain").glob("step-*"))
    return {name.removeprefix(PARAMETER_PREFIX): weight for name, weight in ShardedState(last).whole(WEIGHT)}


def results(directory: RunDirectory) -> list[Path]:
    return [directory.compact, directory.sparse, directory.model]


def test_what_lies_beside_the_source_goes_with_every_result(source: Path, directory: RunDirectory) -> None:
    for folder in results(directory):
        for name in BESIDE:
            assert (folder / name).read_bytes() == (source / name).read_bytes(), f"{folder.name}: {name}"


def test_every_config_has_the_rope_of_the_source_in_both_spellings(directory: RunDirectory) -> None:
    for folder in results(directory):
        said = json.loads((folder / "config.json").read_text())
        assert (said["rope_theta"], said["rope_scaling"]) == (500_000.0, LLAMA3), folder.name
        assert said["rope_parameters"] == {**LLAMA3, "rope_theta": 500_000.0}, folder.name
        assert said["torch_dtype"] == said["dtype"], folder.name


def test_the_final_model_is_in_the_dtype_of_the_source_and_stages_hand_over_fp32(directory: RunDirectory) -> None:
    for folder in (directory.compact, directory.sparse):
        assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.float32}
    found, exact = load_file(directory.model / "model.safetensors"), trained(directory)
    assert found.keys() == exact.keys()
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in exact.items())
    assert not all(torch.equal(weight.bfloat16().float(), weight) for weight in exact.values())
    assert AutoModelForCausalLM.from_pretrained(directory.model, dtype="auto").dtype == torch.bfloat16
    assert differences(directory.model) == []  # the zeros stay, and the manifest is of what was written


def test_another_dtype_changes_nothing_but_the_result(
    directory: RunDirectory, tiny_inputs: Path, source: Path, tmp_path: Path
) -> None:
    data = recipe_data(tiny_inputs, source=source, run_dir=tmp_path / "run")
    data["model"]["save_dtype"] = "fp32"
    other = run(Recipe.model_validate(data), stages=("prune", "compact", "sparsify", "pretrain"))
    exact = trained(directory)
    found = load_file(other.model / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in exact.items())
    assert all(torch.equal(weight, exact[name]) for name, weight in trained(other).items())


def test_everybody_who_may_read_the_folder_may_read_the_files(directory: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    usual = (tmp_path / "any").stat().st_mode
    files = [path for path in directory.path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if path.stat().st_mode != usual]


def test_nothing_but_weights_is_called_so(directory: RunDirectory) -> None:
    for folder in results(directory):
        with init_empty_weights():
            parameters = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
        for path in folder.rglob("*.safetensors"):
            for name, entry in read_header(path)[0].items():
                assert entry.shape == tuple(parameters[name].shape), f"{path}: {name}"
