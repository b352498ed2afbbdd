"""An exported model computes what the dense one does, with the listed layers converted and no others."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shearing.errors import ShearingError
from shearing.files.durable import read_json
from shearing.pruning.sparse.semi_structured.export import export
from shearing.pruning.sparse.semi_structured.hardware import find_hardware, relative_error
from shearing.pruning.sparse.semi_structured.loading import convert_layers, load
from tests.pruning.sparse.semi_structured.pretended import Converted, pretended, small_config, two_of_four_model

IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export in which attention is converted and the MLP, not 2:4, is dense."""
    model = two_of_four_model(tmp_path / "sparse", dense=("gate_proj", "up_proj", "down_proj"))
    return export(str(model), output=tmp_path / "out", batches=[64], hardware=pretended(), console=Console(quiet=True))


def changed(folder: Path, **values: Any) -> Path:
    path = folder / "semi_structured.json"
    path.write_text(json.dumps({**read_json(path), **values}))
    return folder


def test_listed_layers_are_converted_and_results_are_the_same(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(folder, hardware=pretended())
    converted = {name for name, of in model.named_modules() if isinstance(getattr(of, "weight", None), Converted)}
    assert converted == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in ("q", "k", "v", "o")
    }
    assert not model.training
    assert model.config.use_cache
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense(IDS).logits)
        written = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(written, dense.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0))
    assert load(str(folder), hardware=pretended()).dtype == torch.bfloat16


def test_another_device_is_warned_about(folder: Path) -> None:
    with pytest.warns(UserWarning, match="device was Pretended GPU, here it is Other GPU.*export the model again"):
        load(folder, hardware=pretended(name="Other GPU"))


def test_another_torch_is_warned_about(folder: Path) -> None:
    measured = {**read_json(folder / "semi_structured.json")["measured"], "torch": "2.6.0"}
    with pytest.warns(UserWarning, match="torch was 2.6.0, here it is") as caught:
        load(changed(folder, measured=measured), hardware=pretended())
    assert len(caught) == 1


def test_a_backend_that_is_not_here(folder: Path) -> None:
    with pytest.raises(ShearingError, match=r"layers for cusparselt, which does not work on this Pretended GPU"):
        load(folder, hardware=pretended(backends=("cutlass",)))


def test_weights_that_were_trained_on(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][2, 4:8] = 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShearingError, match="row 2, inputs 4 to 7: 4 are not zero") as raised:
        load(folder, hardware=pretended())
    assert raised.value.field == "model.layers.1.self_attn.o_proj.weight"


def test_no_export(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ShearingError, match=r"no semi_structured\.json"):
        load(tmp_path / "sparse", hardware=pretended())
    with pytest.raises(ShearingError, match="format 2"):
        load(changed(folder, format=2), hardware=pretended())


def test_without_hardware(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ShearingError, match="no GPU that torch can use"):
        load(folder)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_converted_and_dense_agree_on_this_gpu(tmp_path: Path) -> None:
    try:
        here = find_hardware()
    except ShearingError as error:
        pytest.skip(str(error))
    model = two_of_four_model(tmp_path / "sparse", config=small_config(hidden_size=256, intermediate_size=512))
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(here.device)
    names = [name for name, of in dense.model.named_modules() if isinstance(of, torch.nn.Linear)]
    ids = IDS.to(here.device)
    with torch.no_grad():
        expected = dense(ids).logits
    for backend in here.converters:
        converted = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(here.device)
        convert_layers(converted, backends={f"model.{name}": backend for name in names}, hardware=here)
        with torch.no_grad():
            assert relative_error(converted(ids).logits, expected=expected) < 0.05, backend
            converted.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
