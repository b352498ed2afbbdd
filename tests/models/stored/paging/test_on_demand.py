"""A model whose weights come when they are needed computes what the whole one does, with one layer at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from shearing.errors import ShearingError
from shearing.models.anatomy import decoder_layers, head_weight
from shearing.models.cutting import compact
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.models.stored.paging.on_demand import is_on_demand, on_demand, weights_by_name, weights_here
from shearing.models.stored.paging.passing import last_states, layer_calls
from shearing.models.stored.stored_model import open_source
from shearing.pruning.structured.granularities import unit_sizes
from shearing.pruning.structured.rounding import select
from tests.models.tiny import tiny_ids, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(params=[("llama", True), ("qwen2-sliding", False)], ids=["tied", "untied, windows, biases"])
def folder(request: Any, tmp_path: Path) -> Path:
    family, tied = request.param
    tiny_model(family, tied=tied).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def opened(folder: Path, **settings: Any) -> PreTrainedModel:
    return on_demand(open_source(str(folder), revision=None, converted=folder / "converted"), device=CPU, **settings)


def whole_of(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def batches(*, number: int) -> list[dict[str, Any]]:
    return [{"input_ids": tiny_ids(seed=seed), "use_cache": False} for seed in range(number)]


def layers_here(model: PreTrainedModel) -> list[int]:
    layers = enumerate(decoder_layers(model))
    return [index for index, layer in layers if all(weight.isfinite().all() for weight in layer.parameters())]


@torch.no_grad()
def test_what_comes_out_is_that_of_the_whole_model_with_one_layer_at_a_time(folder: Path) -> None:
    model, whole = opened(folder), whole_of(folder)
    assert is_on_demand(model)
    assert not is_on_demand(whole)
    there: list[list[int]] = []
    for layer in decoder_layers(model):
        layer.mlp.register_forward_pre_hook(lambda *_: there.append(layers_here(model)))
    expected = list(last_states(whole, batches(number=7)))
    assert all(torch.equal(a, b) for a, b in zip(last_states(model, batches(number=7)), expected, strict=True))
    assert {len(layers) for layers in there} == {1}
    # The largest weight is 97 x 36: three batches of 2 x 16 go together.
    assert [layers[0] for layers in there] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] * 2 + [0, 1, 2, 3]
    # By itself it is called as any model is.
    logits = whole(**batches(number=1)[0]).logits
    with weights_here(head_weight(model)):
        torch.testing.assert_close(model(**batches(number=1)[0]).logits, logits, rtol=0.0, atol=0.0)


@torch.no_grad()
def test_what_nobody_asked_for_is_nan_and_what_is_changed_goes(folder: Path) -> None:
    model = opened(folder)
    layer, head = decoder_layers(model)[2], head_weight(model)
    stored = whole_of(folder).get_parameter("model.layers.2.mlp.down_proj.weight")
    assert head.isnan().all()
    with weights_here(layer, head):
        assert torch.equal(layer.mlp.down_proj.weight, stored)
        assert head.isfinite().all()
        layer.mlp.down_proj.weight.zero_()
        with weights_here(decoder_layers(model)[0]):
            assert layers_here(model) == [0, 2]
        assert not layer.mlp.down_proj.weight.any()
    with weights_here(decoder_layers(model)[1]):
        assert layers_here(model) == [1]
    with weights_here(layer):
        assert torch.equal(layer.mlp.down_proj.weight, stored)
    with weights_here(model):
        assert layers_here(model) == [0, 1, 2, 3]


def test_a_pass_that_computes_no_layer_wakes_none_and_nobody_hears_of_it(folder: Path) -> None:
    model = opened(folder)
    heard: list[Any] = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda *_: heard.append(_))
    stream, calls = layer_calls(model, **batches(number=1)[0])
    expected, others = layer_calls(whole_of(folder), **batches(number=1)[0])
    assert torch.equal(stream, expected)
    assert len(calls) == len(others) == 4
    assert not heard
    assert not layers_here(model)


@torch.no_grad()
def test_it_is_masked_and_cut_as_the_whole_model_is(folder: Path) -> None:
    whole, model = whole_of(folder), opened(folder)
    generator = torch.Generator().manual_seed(0)
    masks = Masks(hidden=torch.rand(36, generator=generator), attention=torch.rand(4), intermediate=torch.rand(4, 40))
    masked, expected = MaskedModel(model), MaskedModel(whole)
    for each in (masked, expected):
        each.set_masks(masks)
    states = [next(last_states(each.model, batches(number=1))) for each in (masked, expected)]
    torch.testing.assert_close(states[0], states[1], rtol=0.0, atol=0.0)
    masked.release()
    source = Shape.of(whole.config)
    target = dataclasses.replace(source, num_hidden_layers=2, hidden_size=24, intermediate_size=20)
    scores = {name: torch.rand(size, generator=generator) for name, size in unit_sizes(source).items()}
    chosen, selection = select(scores, source=source, target=target)
    cut, wanted = (compact(each, masks=chosen, selection=selection) for each in (model, expected.release()))
    theirs = dict(wanted.named_parameters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in cut.named_parameters())


@torch.no_grad()
def test_other_files_replace_weights_and_what_is_not_finite_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "instead").mkdir()
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({name: torch.full((40, 36), 0.1)}, tmp_path / "instead" / "00001.safetensors")
    weights = weights_by_name(opened(folder, instead=tmp_path / "instead"))
    assert (weights[name] == 0.1).all()
    other = name.replace(".1.", ".2.")
    assert torch.equal(weights[other], whole_of(folder).get_parameter(other))
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[other][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    broken = opened(folder)
    with pytest.raises(ShearingError, match=r"model\.layers\.2\.mlp\.up_proj"):
        list(last_states(broken, batches(number=1)))
