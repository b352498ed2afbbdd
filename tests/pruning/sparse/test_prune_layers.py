"""Layer by layer equals the whole model in memory, for every family; where activations wait changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shearing.errors import ShearingError
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.stored.stored_model import open_source
from shearing.pruning.calibration.places import matrices_of
from shearing.pruning.calibration.statistics import InputStatistics
from shearing.pruning.calibration.stored_walk import Compute
from shearing.pruning.calibration.text import Calibration
from shearing.pruning.sparse.criteria import criteria
from shearing.pruning.sparse.patterns import KeptOf
from shearing.pruning.sparse.prune_layers import Method, prune_layers, units_of_work
from shearing.pruning.sparse.reconstruction import reconstructions
from shearing.pruning.sparse.reconstruction.reconstruction import Choice
from shearing.pruning.sparse.stored.pruned_layers import PrunedLayers
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model
from tests.pruning.sparse import oracle

TOKENS = tiny_ids(sequences=5, length=24)
LAYERS = 3
PATTERN = KeptOf(2, 4)
GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
}
"""Linear layers that read the same, by family; that of most has the names of Llama's."""


def small(family: str) -> PreTrainedModel:
    """`tiny_model` without its last layer; one of what is left attends through a window in "qwen2-sliding"."""
    model = tiny_model(family)
    del decoder_layers(model)[LAYERS:]
    model.config.num_hidden_layers = LAYERS
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:LAYERS]
    return model


def method_of(name: str, *, matrices: list[str], true_sequential: bool = False) -> Method:
    way = reconstructions()["obs" if name == "sparsegpt" else "none"]
    return Method(criteria()[name], way, dict.fromkeys(matrices, PATTERN), 0.01, true_sequential)


def compute_of(folder: Path, *, micro_batch_size: int = 5, offload: str = "cpu") -> Compute:
    return Compute(torch.device("cpu"), torch.float32, micro_batch_size, offload, folder)  # type: ignore[arg-type]


def pruned(
    model: PreTrainedModel,
    folder: Path,
    *,
    name: str = "wanda",
    true_sequential: bool = False,
    micro_batch_size: int = 5,
    offload: str = "cpu",
) -> dict[str, Tensor]:
    """Weights of every pruned matrix."""
    model.save_pretrained(folder / "model")
    source = open_source(str(folder / "model"), revision=None, converted=folder / "converted")
    method = method_of(name, matrices=[matrix.name for matrix in matrices_of(source)], true_sequential=true_sequential)
    compute = compute_of(folder, micro_batch_size=micro_batch_size, offload=offload)
    calibration = Calibration(TOKENS, "random")
    pruned_layers = PrunedLayers(folder / f"blocks-{offload}-{micro_batch_size}")
    calls: list[int] = []
    prune_layers(
        source,
        method=method,
        calibration=calibration,
        compute=compute,
        pruned_layers=pruned_layers,
        advance=calls.append,
    )
    assert sum(calls) == units_of_work(source, method=method, calibration=calibration, compute=compute)
    return {name: weight for layer in range(LAYERS) for name, weight in pruned_layers.weights(layer).items()}


@torch.no_grad()
def pruned_whole(model: PreTrainedModel, *, name: str, true_sequential: bool) -> dict[str, Tensor]:
    """The same with the whole model in memory: every pass starts at the tokens."""
    found: dict[str, Tensor] = {}
    method = method_of(name, matrices=[], true_sequential=true_sequential)
    for index, layer in enumerate(decoder_layers(model)):
        linears = {n: module for n, module in layer.named_modules() if isinstance(module, nn.Linear)}
        groups = GROUPS.get(model.config.model_type, GROUPS["llama"])
        for group in groups if true_sequential else [[member for members in groups for member in members]]:
            statistics = {}
            handles = []
            for linear, module in linears.items():
                if linear.rpartition(".")[2] in group:
                    needs = method.criterion.needs | method.reconstruction.needs
                    statistics[linear] = InputStatistics(module.in_features, needs=needs, device=torch.device("cpu"))
                    add = statistics[linear].add
                    handles.append(module.register_forward_pre_hook(lambda _, args, add=add: add(args[0])))
            model(TOKENS, use_cache=False)
            for handle in handles:
                handle.remove()
            for linear, of_inputs in statistics.items():
                weight = linears[linear].weight
                new, _ = method.reconstruction.prune(weight, choice=Choice(method.criterion, PATTERN, of_inputs))
                weight.copy_(new)
                found[f"{anatomy_of(model.config).layers}.{index}.{linear}.weight"] = new
    return found


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_equals_the_whole_model_in_memory(family: str, name: str, tmp_path: Path) -> None:
    model = small(family)
    found = pruned(model, tmp_path, name=name)
    expected = pruned_whole(model, name=name, true_sequential=False)
    assert found.keys() == expected.keys()
    for matrix, weight in expected.items():
        assert torch.equal(found[matrix], weight), matrix


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_true_sequential_equals_the_whole_model_in_memory(name: str, tmp_path: Path) -> None:
    model = small("qwen3")
    found = pruned(model, tmp_path, name=name, true_sequential=True)
    for matrix, weight in pruned_whole(model, name=name, true_sequential=True).items():
        assert torch.equal(found[matrix], weight), matrix


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_where_activations_wait_changes_nothing(offload: str, tmp_path: Path) -> None:
    model = small("llama")
    expected = pruned(model, tmp_path, micro_batch_size=2)
    found = pruned(model, tmp_path, micro_batch_size=2, offload=offload)
    for matrix, weight in expected.items():
        assert torch.equal(found[matrix], weight), matrix


def test_inputs_come_from_pruned_layers(tmp_path: Path) -> None:
    """The second layer's masks depend on whether the first was pruned."""
    model = small("llama")
    found = pruned(model, tmp_path)
    source = open_source(str(tmp_path / "model"), revision=None, converted=tmp_path / "converted")
    only = [matrix.name for matrix in matrices_of(source) if matrix.layer == 1]
    pruned_layers = PrunedLayers(tmp_path / "alone")
    prune_layers(
        source,
        method=method_of("wanda", matrices=only),
        calibration=Calibration(TOKENS, "random"),
        compute=compute_of(tmp_path),
        pruned_layers=pruned_layers,
    )
    assert any(not torch.equal(weight, found[name]) for name, weight in pruned_layers.weights(1).items())
    assert not pruned_layers.weights(0)
    assert not pruned_layers.weights(2)


def test_sparsegpt_errs_less_than_wanda_on_every_linear(tmp_path: Path) -> None:
    """Of the dense model's outputs, given the same inputs."""
    model = small("llama")
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
    model(TOKENS, use_cache=False)
    for name, inputs in seen.items():
        weight = model.get_submodule(name).weight.detach()
        statistics = InputStatistics(
            weight.shape[1], needs=frozenset({"squares", "moment"}), device=torch.device("cpu")
        )
        statistics.add(inputs)
        errors = []
        for criterion, way in (("sparsegpt", "obs"), ("wanda", "none")):
            choice = Choice(criteria()[criterion], PATTERN, statistics)
            errors.append(oracle.output_error(weight, reconstructions()[way].prune(weight, choice=choice)[0], inputs))
        assert errors[0] <= errors[1], name


def test_activations_that_are_not_finite(tmp_path: Path) -> None:
    model = small("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(ShearingError, match=r"layer 2 \(attention read\)"):
        pruned(model, tmp_path)
