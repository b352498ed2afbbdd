"""One-shot sparsity on experts: each expert's matrices apart, by the tokens that the expert has."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from shearing.errors import ShearingError
from shearing.models.stored.expert_files import whole_masks
from shearing.models.stored.stored_model import open_source
from shearing.pruning.calibration import stored_walk
from shearing.pruning.calibration.dense_layers import dense_layers
from shearing.pruning.calibration.places import Matrix, matrices_of
from shearing.pruning.calibration.statistics import Need
from shearing.pruning.calibration.text import Calibration
from shearing.pruning.sparse.prune_layers import prune_layers, units_of_work
from shearing.pruning.sparse.stored.pruned_layers import PrunedLayers
from tests.models.experts import expert_configs
from tests.models.tiny import tiny_ids, tiny_model
from tests.pruning.sparse.test_prune_layers import compute_of, method_of

TOKENS = tiny_ids(sequences=5, length=24)


@pytest.fixture(autouse=True, scope="module")
def _configs() -> Iterator[None]:
    with expert_configs():
        yield


def pruned(
    model: PreTrainedModel, folder: Path, *, name: str, true_sequential: bool = False, without: str = ""
) -> dict[str, Tensor]:
    model.save_pretrained(folder / "model")
    source = open_source(str(folder / "model"), revision=None, converted=folder / "converted")
    matrices = matrices_of(source)
    assert len(matrices) == 4 * (4 + 3 * 6)
    matrices = [matrix for matrix in matrices if not fnmatchcase(matrix.name, without)]
    method = method_of(name, matrices=[matrix.name for matrix in matrices], true_sequential=true_sequential)
    compute, calibration = compute_of(folder, micro_batch_size=2), Calibration(TOKENS, "random")
    layers, calls = PrunedLayers(folder / "blocks"), list[int]()
    prune_layers(
        source, method=method, calibration=calibration, compute=compute, pruned_layers=layers, advance=calls.append
    )
    assert sum(calls) == units_of_work(source, method=method, calibration=calibration, compute=compute)
    return {name: weight for layer in range(4) for name, weight in layers.weights(layer).items()}


def two_of_four(scores: Tensor) -> Tensor:
    kept = scores.view(len(scores), -1, 4).topk(2, dim=-1).indices
    return torch.zeros(len(scores), scores.shape[1] // 4, 4, dtype=torch.bool).scatter_(-1, kept, True).flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_wanda_goes_by_the_tokens_of_each_expert(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tied=False)
    found = pruned(model, tmp_path, name="wanda")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    block, seen = model.model.layers[0].mlp, list[Tensor]()
    block.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].flatten(0, 1)))
    model(TOKENS)
    _, _, index = block.gate(seen[0])
    files, (gate, up, down) = (
        ("block_sparse_moe", ("w1", "w3", "w2"))
        if family == "mixtral"
        else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    )
    for expert in range(6):
        x = seen[0][(index == expert).any(-1)]
        prefix = f"model.layers.0.{files}.experts.{expert}"
        inner = torch.nn.functional.silu(x @ stored[f"{prefix}.{gate}.weight"].T) * (
            x @ stored[f"{prefix}.{up}.weight"].T
        )
        for name, inputs in ((gate, x), (up, x), (down, inner)):
            weight = stored[f"{prefix}.{name}.weight"]
            norms = inputs.square().sum(0).sqrt() if len(x) else torch.ones(weight.shape[1])
            mask = two_of_four(weight.abs() * norms)
            assert torch.equal(found[f"{prefix}.{name}.weight"], weight * mask)


def test_an_expert_without_tokens_is_pruned_by_magnitude(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tied=False)
    with torch.no_grad():
        for layer in model.model.layers:
            # Whatever is read, two of the first four are ahead of the others.
            scales = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 0.0])
            layer.mlp.gate.weight.copy_(scales[:, None] * layer.mlp.gate.weight[0].clone())
    stored = dict(model.named_parameters())["model.layers.2.mlp.experts.gate_up_proj"].detach()
    found = pruned(model, tmp_path, name="sparsegpt", true_sequential=True)
    weight = stored[5, :24]
    pruned_weight = found["model.layers.2.mlp.experts.5.gate_proj.weight"]
    torch.testing.assert_close(pruned_weight, weight * two_of_four(weight.abs()))


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_an_expert_whose_write_stays_dense_is_pruned_by_what_it_reads(name: str, tmp_path: Path) -> None:
    """In a layer experts are computed one after the other, so the last one reads behind what the others write."""
    found = pruned(tiny_model("mixtral", tied=False), tmp_path / "all", name=name)
    without = "*.experts.5.w2.weight"
    some = pruned(tiny_model("mixtral", tied=False), tmp_path / "some", name=name, without=without)
    assert found.keys() - some.keys() == {f"model.layers.{n}.block_sparse_moe.experts.5.w2.weight" for n in range(4)}
    # Layers behind the first read what that one's dense matrix writes.
    first = [matrix for matrix in some if matrix.startswith("model.layers.0.")]
    assert "model.layers.0.block_sparse_moe.experts.5.w1.weight" in first
    assert all(torch.equal(some[matrix], found[matrix]) for matrix in first)


def test_a_place_that_text_does_not_come_to_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_walk, "last_computed", lambda places: places[0])
    with pytest.raises(ShearingError, match="linear layers that the calibration text goes through"):
        pruned(tiny_model("mixtral", tied=False), tmp_path, name="wanda")


@pytest.mark.parametrize("place", ["w1", "w2"])
def test_statistics_of_the_last_layer_are_those_of_what_is_read(place: str, tmp_path: Path) -> None:
    """Of the matrices of one kind alone, too, and so of all places that a pass may end at."""
    tiny_model("mixtral", tied=False).save_pretrained(tmp_path / "model")
    source = open_source(str(tmp_path / "model"), revision=None, converted=tmp_path / "converted")
    last = [matrix for matrix in matrices_of(source) if matrix.layer == 3 and "experts" in matrix.name]

    def squares(chosen: list[Matrix]) -> dict[str, Tensor]:
        compute, calibration = compute_of(tmp_path), Calibration(TOKENS, "random")
        needs: frozenset[Need] = frozenset({"squares"})
        (layer,) = dense_layers(
            source, matrices=chosen, needs=needs, damping=0.01, calibration=calibration, compute=compute
        )
        return {name: of.squares for name, of in layer.statistics.items() if of is not None}

    whole = squares(last)
    some = squares([matrix for matrix in last if f".5.{place}" in matrix.name or ".0." in matrix.name])
    assert any(f".5.{place}" in name for name in some)
    assert all(torch.equal(found, whole[name]) for name, found in some.items())


def test_masks_of_files_are_those_of_stacks() -> None:
    model = tiny_model("mixtral", tied=False)
    masks = {
        "model.layers.1.self_attn.q_proj.weight": torch.ones(48, 40, dtype=torch.bool),
        "model.layers.1.block_sparse_moe.experts.2.w3.weight": torch.zeros(24, 40, dtype=torch.bool),
        "model.layers.3.block_sparse_moe.experts.0.w2.weight": torch.zeros(40, 24, dtype=torch.bool),
    }
    found = dict(whole_masks(model, masks.items()))
    assert found.keys() == {
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.3.mlp.experts.down_proj",
    }
    expected = torch.ones(6, 48, 40, dtype=torch.bool)
    expected[2, 24:] = False
    assert torch.equal(found["model.layers.1.mlp.experts.gate_up_proj"], expected)
    assert int((~found["model.layers.3.mlp.experts.down_proj"]).sum()) == 40 * 24
