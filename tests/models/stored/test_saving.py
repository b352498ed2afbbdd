"""Models on disk as `save_pretrained` writes them: the same tensors under the same names, in shards or in one file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shearing.errors import ShearingError
from shearing.models.loading import load_source
from shearing.models.stored.saving import save_model, write_model
from tests.models.tiny import CONFIGS, tiny_model


@pytest.fixture(params=[(family, tied) for family in sorted(CONFIGS) for tied in (False, True)], ids=str)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, tied = request.param
    return tiny_model(family, tied=tied)


def test_one_file_as_transformers_writes_it(model: PreTrainedModel, tmp_path: Path) -> None:
    write_model(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    name = "model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    ours, theirs = (json.loads((tmp_path / of / "config.json").read_text()) for of in ("ours", "theirs"))
    added = {"rope_theta", "rope_local_base_freq", "rope_scaling", "torch_dtype", "partial_rotary_factor"}
    added |= {"rotary_emb_base", "rotary_pct"}
    assert {name: value for name, value in ours.items() if name not in added} == theirs
    assert list(ours) == sorted(ours)


def test_a_model_like_another_has_its_tokenizer(tiny_inputs: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_inputs / "model")
    save_model(model, tmp_path / "small", like=str(tiny_inputs / "model"))
    assert json.loads((tmp_path / "small" / "config.json").read_text())["rope_theta"] == 10_000.0
    tokenizer = "tokenizer.json"
    assert (tmp_path / "small" / tokenizer).read_bytes() == (tiny_inputs / "model" / tokenizer).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("said", [True, False])
def test_a_reader_keeps_keys_and_values_as_the_source_says(tiny_inputs: Path, tmp_path: Path, said: bool) -> None:
    shutil.copytree(tiny_inputs / "model", source := tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "use_cache": said}))
    model = load_source(str(source))
    save_model(model, tmp_path / "small", like=str(source))
    assert model.config.use_cache is False
    assert AutoConfig.from_pretrained(tmp_path / "small").use_cache is said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_rounded_once_and_the_model_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("qwen2", tied=False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    write_model(model, tmp_path, dtype=dtype, shard_bytes=12_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert all(file.stat().st_size < 12_000 + 4_000 for file in files)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], weight.to(dtype)) for name, weight in before.items())
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["dtype"] == said["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_a_weight_that_is_too_large_for_fp16_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 70_000.0
    with pytest.raises(ShearingError, match="up_proj") as caught:
        write_model(model, tmp_path, dtype=torch.float16)
    assert caught.value.field == "save_dtype"


def test_shards_hold_every_tensor_once_and_no_more_than_they_may(model: PreTrainedModel, tmp_path: Path) -> None:
    write_model(model, tmp_path, shard_bytes=12_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    of_files = {file.name: load_file(file) for file in files}
    for tensors in of_files.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 12_000
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in of_files.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for of in of_files.values() for t in of.values())
    with safe_open(files[0], framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())
