"""Files of models with experts: each expert's matrices under names of their own, as the models are published."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shearing.errors import ShearingError
from shearing.files.tensors import read_header
from shearing.models.loading import load_source
from shearing.models.stored.saving import write_model
from shearing.models.stored.stored_model import open_source
from tests.models.experts import expert_configs
from tests.models.tiny import tiny_ids, tiny_model


@pytest.fixture(autouse=True, scope="module")
def _configs() -> Iterator[None]:
    with expert_configs():
        yield


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_files_are_those_that_transformers_writes(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tied=False)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_model(model, ours)
    model.save_pretrained(theirs)
    expected, found = (load_file(folder / "model.safetensors") for folder in (theirs, ours))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    loaded = AutoModelForCausalLM.from_pretrained(ours)
    torch.testing.assert_close(loaded(tiny_ids()).logits, model(tiny_ids()).logits, rtol=0, atol=0)
    assert open_source(str(ours), revision=None, converted=tmp_path / "none").folder == ours


def test_stacks_in_one_piece_are_read_too(tmp_path: Path) -> None:
    """As transformers 5 writes them where it is told not to go back to the names of the hub."""
    model, folder = tiny_model("mixtral", tied=False), tmp_path / "whole"
    model.save_pretrained(folder, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in read_header(folder / "model.safetensors")[0]
    loaded = load_source(str(folder))
    torch.testing.assert_close(loaded(tiny_ids()).logits, model(tiny_ids()).logits, rtol=0, atol=0)
    source = open_source(str(folder), revision=None, converted=tmp_path / "converted")
    assert source.folder == tmp_path / "converted"
    assert source.entries["model.layers.0.block_sparse_moe.experts.5.w2.weight"].shape == (40, 24)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    write_model(tiny_model("qwen3_moe", tied=False), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.4.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ShearingError, match=r"layers\.2\.mlp\.experts\.4\.up_proj"):
        load_source(str(tmp_path))
