"""A model whose weights stay in their files is the model: what it computes, what it scores, what a refit leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shearing.data.documents import Inputs
from shearing.errors import ShearingError
from shearing.models.anatomy import decoder_layers
from shearing.models.loading import load_paged, load_source
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.models.stored.paged import all_at_once, layers_in_turn, stop_paging
from shearing.models.stored.places import weight_in
from shearing.models.stored.saving import write_model
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.registry import METRICS, complete_metrics, metric_of
from shearing.pruning.structured.refitting import refit
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model

BY_LAYER = [name for name in complete_metrics() if METRICS[name].by_layer]


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
        f"model.layers.{index}.{name}"
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


@pytest.mark.parametrize("name", BY_LAYER)
def test_metrics_that_look_at_a_layer_at_a_time_score_the_same(name: str, folder: Path) -> None:
    model = load_source(str(folder))
    evidence = Evidence(text=[Inputs(tiny_ids())])
    expected = metric_of(name).scores(model, evidence=evidence)
    found = metric_of(name).scores(load_paged(str(folder)), evidence=evidence)
    assert found.keys() == expected.keys()
    for granularity, scores in expected.items():
        assert torch.equal(found[granularity], scores), granularity


def test_all_at_once_is_the_whole_model(folder: Path) -> None:
    model, whole = load_paged(str(folder)), load_source(str(folder))
    with all_at_once(model):
        assert all(torch.equal(model.get_parameter(name), weight) for name, weight in whole.named_parameters())
        assert [index for index, _ in enumerate(layers_in_turn(model))] == list(range(len(decoder_layers(model))))
        expected, found = (
            torch.autograd.grad(of(tiny_ids()).logits.square().mean(), list(of.parameters())) for of in (whole, model)
        )
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not any(name.startswith("model.layers") for name in in_memory(model))


@pytest.mark.parametrize("keeps", [True, False])
def test_refitted_layers_are_kept_and_are_those_of_the_whole_model(folder: Path, tmp_path: Path, keeps: bool) -> None:
    changes = tmp_path / "changes"
    models = [load_source(str(folder)), load_paged(str(folder), changes=changes, keeps=keeps)]
    masks = _masks(Shape.of(models[0].config))
    for model in models:
        refit(MaskedModel(model), masks=masks, batches=[Inputs(tiny_ids())])
    names = {id(parameter): name for name, parameter in models[1].named_parameters()}
    places = {names[id(parameter)]: place for parameter, place in stop_paging(models[1]).items()}
    if not keeps:
        assert not changes.exists()
        return
    assert stop_paging(models[1]) == {}
    assert in_memory(models[1]) == []
    changed = 0
    for name, weight in models[0].named_parameters():
        assert torch.equal(places[name].read(device="cpu"), weight.flatten()), name
        rows = slice(3, 3 + weight.numel() // 2)
        assert torch.equal(places[name].read(device="cpu", start=3, numel=weight.numel() // 2), weight.flatten()[rows])
        changed += places[name].path.parent == changes
    assert changed == sum(1 for name in names.values() if name.startswith("model.layers"))


def _masks(source: Shape) -> Masks:
    units = torch.ones(source.num_hidden_layers, source.intermediate_size)
    units[:, ::3] = 0.0
    hidden = torch.ones(source.hidden_size)
    hidden[1::4] = 0.0
    return Masks(hidden=hidden, intermediate=units)


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
