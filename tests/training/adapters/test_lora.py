from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from shearing.errors import ShearingError
from shearing.pruning.sparse.one_shot import sparsify
from shearing.pruning.sparse.recipe import SparsifyRecipe
from shearing.pruning.sparse.stored.masks import FILE_NAME, read_masks
from shearing.training.adapters.lora import add_adapters, merge_adapters
from tests.models.tiny import VOCAB_SIZE, tiny_ids, tiny_model

pytest.importorskip("peft")
FAMILIES = ("llama", "llama-biases", "mistral", "qwen2", "qwen3")


def sparse_model(family: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Half of every matrix of every layer dropped, by chance."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    masks = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                masks[name] = torch.rand(parameter.shape, generator=generator) < 0.5
                parameter.mul_(masks[name])
    return model, masks


def train(adapted: Any, *, steps: int = 5, vocab_size: int = VOCAB_SIZE) -> None:
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    adapted.train()
    for step in range(steps):
        ids = tiny_ids(seed=step) % vocab_size
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_computes_what_was_trained_and_keeps_every_zero(family: str, dropout: float) -> None:
    model, masks = sparse_model(family)
    before = {name: model.get_parameter(name).clone() for name in masks}
    adapted = add_adapters(
        model, masks=masks.items(), dropout=dropout, targets=("q_proj", "v_proj", "o_proj", "down_proj")
    )
    train(adapted)
    with torch.no_grad():
        trained = adapted(input_ids=tiny_ids(seed=9)).logits
    merged = merge_adapters(adapted, masks=masks.items())
    assert {name for name, _ in merged.named_parameters()} == {
        name for name, _ in tiny_model(family).named_parameters()
    }
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=tiny_ids(seed=9)).logits, trained, rtol=1e-5, atol=1e-5)
    for name, mask in masks.items():
        weight = merged.get_parameter(name)
        assert not weight[~mask].any(), name
        changed = not torch.equal(weight, before[name])
        assert changed == any(part in name for part in ("q_proj", "v_proj", "o_proj", "down_proj")), name


def test_gradients_are_those_of_the_masked_sum() -> None:
    model, masks = sparse_model("llama")
    adapted = add_adapters(model, masks=masks.items(), dropout=0.0, rank=3, alpha=5.0)
    layer = adapted.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    mask = masks["model.layers.1.self_attn.v_proj.weight"]
    a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    with torch.no_grad():
        b.normal_()
    inputs = torch.randn(2, 7, 36, requires_grad=True)
    weights = torch.randn(2, 7, 24)
    (layer(inputs) * weights).sum().backward()
    ours = [inputs.grad, a.grad, b.grad]
    for tensor in (inputs, a, b):
        tensor.grad = None
    weight = layer.base_layer.weight + (b @ a) * mask * (5.0 / 3)
    ((inputs @ weight.t()) * weights).sum().backward()
    for mine, reference in zip(ours, [inputs.grad, a.grad, b.grad], strict=True):
        torch.testing.assert_close(mine, reference)


def test_bf16_autocast_and_merging_in_bf16() -> None:
    model, masks = sparse_model("llama")
    adapted = add_adapters(model.to(torch.bfloat16), masks=masks.items(), dropout=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(adapted)
    merged = merge_adapters(adapted, masks=masks.items())
    for name, mask in masks.items():
        assert not merged.get_parameter(name)[~mask].any()


def test_no_copy_of_a_weight_is_kept_for_the_backward_pass() -> None:
    model, masks = sparse_model("llama")
    adapted = add_adapters(model, masks=masks.items(), dropout=0.0)
    layer = adapted.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    known = {tensor.untyped_storage().data_ptr() for tensor in (*adapted.parameters(), layer.kept)}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    inputs = torch.randn(1, 2, 36)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(inputs)
    new = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in known]
    assert all(tensor.numel() <= inputs.numel() for tensor in new)


def test_other_masks_are_noticed_when_merging() -> None:
    model, masks = sparse_model("llama")
    adapted = add_adapters(model, masks=masks.items())
    with pytest.raises(ShearingError, match="dropped weights are not 0 after merging"):
        merge_adapters(adapted, masks=[(name, ~mask) for name, mask in masks.items()])


def test_unknown_targets_are_a_clear_error() -> None:
    model, masks = sparse_model("llama")
    with pytest.raises(ShearingError, match="names of linear layers: down_proj"):
        add_adapters(model, masks=masks.items(), targets=("query",))


def test_adapters_of_a_model_that_was_made_sparse(tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = SparsifyRecipe(
        model=str(tiny_inputs / "model"), output=tmp_path / "sparse", criterion="magnitude", pattern="1:4", device="cpu"
    )
    folder = sparsify(recipe, console=Console(quiet=True))
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = add_adapters(model, masks=read_masks(folder / FILE_NAME), targets=("q_proj", "down_proj"))
    train(adapted, vocab_size=model.config.vocab_size)
    merged = merge_adapters(adapted, masks=read_masks(folder / FILE_NAME))
    weight = merged.model.layers[0].mlp.down_proj.weight
    assert int((weight.view(weight.shape[0], -1, 4) != 0).sum(-1).max()) == 1
