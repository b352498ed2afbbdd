"""In which dtype a model's weights are, whatever its config says and whatever its files are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shearing.models.loading import load_config
from shearing.models.stored.stored_model import dtype_of, dtype_of_weights, open_source


def model_of(tiny_inputs: Path, folder: Path, *, weights: torch.dtype, config: str) -> Path:
    """The tiny model with weights in one dtype and a config that says another."""
    shutil.copytree(tiny_inputs / "model", folder)
    tensors = {name: tensor.to(weights) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "dtype": config, "torch_dtype": config}))
    return folder


@pytest.mark.parametrize(("weights", "config"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_a_model_that_is_converted_keeps_the_dtype_of_its_weights(
    tiny_inputs: Path, tmp_path: Path, weights: torch.dtype, config: str
) -> None:
    folder = model_of(tiny_inputs, tmp_path / "model", weights=weights, config=config)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(str(folder), revision=None, converted=tmp_path / "converted")
    assert source.folder == tmp_path / "converted"
    assert {dtype_of(source, name) for name in source.entries} == {weights}
    read = source.read(source.entries)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_the_index_says_which_files_hold_the_weights(tiny_inputs: Path, tmp_path: Path) -> None:
    folder = model_of(tiny_inputs, tmp_path / "model", weights=torch.bfloat16, config="float32")
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert dtype_of_weights(str(folder), config=load_config(str(folder), revision=None)) == torch.bfloat16


def test_without_weights_the_config_says_the_dtype(tiny_inputs: Path, tmp_path: Path) -> None:
    folder = model_of(tiny_inputs, tmp_path / "model", weights=torch.float32, config="bfloat16")
    config = load_config(str(folder), revision=None)
    (folder / "model.safetensors").unlink()
    for name in (str(folder), "someone/something"):
        assert dtype_of_weights(name, config=config) == torch.bfloat16
