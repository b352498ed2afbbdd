"""A model whose weights stay in their files is the model: what it computes, and what an engine reads of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shearing.errors import ShearingError
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.loading import load_paged, load_source
from shearing.models.stored.paging.paged import stop_paging
from shearing.models.stored.paging.places import weight_in
from shearing.models.stored.saving import write_model
from tests.models.experts import expert_configs
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tiny_model("qwen2", tied=True), tmp_path / "model", dtype=torch.bfloat16, shard_bytes=12_000)
    return tmp_path / "model"


def in_memory(model: torch.nn.Module) -> list[str]:
    return [name for name, each in model.named_parameters() if not bool(each.isnan().any())]


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_it_computes_the_same_and_a_layer_is_in_memory_while_it_runs(family: str, tied: bool, tmp_path: Path) -> None:
    write_model(tiny_model(family, tied=tied), tmp_path, dtype=torch.float16)
    whole, paged = load_source(str(tmp_path)), load_paged(str(tmp_path))
    outside = {name for name, _ in whole.named_parameters()} - {
        f"{anatomy_of(whole).layers}.{index}.{name}"
        for index, layer in enumerate(decoder_layers(whole))
        for name, _ in layer.named_parameters()
    }
    seen: list[set[str]] = []
    for layer in decoder_layers(paged):
        layer.mlp.register_forward_hook(lambda *_: seen.append(set(in_memory(paged)) - outside))
    assert torch.equal(paged(tiny_ids()).logits, whole(tiny_ids()).logits)
    assert [{name.split(".")[2] for name in names} for names in seen] == [{str(index)} for index in range(len(seen))]
    assert set(in_memory(paged)) == outside
    for name, weight in whole.named_parameters():
        assert torch.equal(weight_in(paged, name), weight), name


def test_an_engine_reads_weights_by_range_and_those_that_replace_them(folder: Path, tmp_path: Path) -> None:
    changes, changed = tmp_path / "changes", "model.layers.1.mlp.up_proj.weight"
    model, whole = load_paged(str(folder), changes=changes), load_source(str(folder))
    changes.mkdir()
    replaced = torch.randn(whole.get_parameter(changed).shape)
    save_file({changed: replaced}, changes / "any.safetensors")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places = {names[id(parameter)]: place for parameter, place in stop_paging(model).items()}
    assert stop_paging(model) == {}
    assert in_memory(model) == []
    for name, weight in whole.named_parameters():
        expected = (replaced if name == changed else weight).flatten()
        assert torch.equal(places[name].read(device="cpu"), expected), name
        rows = slice(3, 3 + weight.numel() // 2)
        assert torch.equal(places[name].read(device="cpu", start=3, numel=weight.numel() // 2), expected[rows])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
@torch.no_grad()
def test_experts_that_are_stored_one_by_one_are_read_by_range(family: str, tmp_path: Path) -> None:
    with expert_configs():
        write_model(tiny_model(family, tied=False), tmp_path, dtype=torch.bfloat16, shard_bytes=20_000)
    whole, paged = load_source(str(tmp_path)), load_paged(str(tmp_path))
    assert torch.equal(paged(tiny_ids()).logits, whole(tiny_ids()).logits)
    assert not any(".experts." in name for name in in_memory(paged))
    names = {id(parameter): name for name, parameter in paged.named_parameters()}
    places = {names[id(parameter)]: place for parameter, place in stop_paging(paged).items()}
    assert places.keys() == dict(whole.named_parameters()).keys()
    assert any(len(place.parts) == 2 * 6 for place in places.values())
    for name, weight in whole.named_parameters():
        expected = weight.flatten()
        assert torch.equal(places[name].read(device="cpu"), expected), name
        # From inside of one expert's matrix to inside of another's.
        for start, end in ((3, 3 + weight.numel() // 2), (weight.numel() // 3, weight.numel())):
            found = places[name].read(device="cpu", start=start, numel=end - start, dtype=torch.float64)
            assert torch.equal(found, expected[start:end].double()), name


def test_an_expert_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with expert_configs():
        write_model(tiny_model("mixtral", tied=False), tmp_path, dtype=torch.bfloat16)
    [(path, tensors)] = _files(tmp_path)
    name = next(name for name in tensors if ".1.block_sparse_moe.experts.4.w3." in name)
    tensors[name][1, 2] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ShearingError, match="NaN or infinity") as caught, torch.no_grad():
        load_paged(str(tmp_path))(tiny_ids())
    assert caught.value.field == "source (parameter model.layers.1.mlp.experts.gate_up_proj)"


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight"])
def test_a_weight_that_is_not_finite_is_refused_when_it_is_read(folder: Path, name: str) -> None:
    for path, tensors in _files(folder):
        if name in tensors:
            tensors[name][1, 2] = float("inf")
            save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ShearingError, match="NaN or infinity") as caught, torch.no_grad():
        load_paged(str(folder))(tiny_ids())
    assert caught.value.field == f"source (parameter {name})"


def _files(folder: Path) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    for path in sorted(folder.glob("*.safetensors")):
        yield path, load_file(path)
