"""Side by side with llm-compressor, where it is installed (`make compare-llmcompressor`); its N:M counts the pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from shearing.models.stored.stored_model import open_source
from shearing.pruning.calibration.places import matrices_of
from shearing.pruning.calibration.statistics import InputStatistics
from shearing.pruning.calibration.stored_walk import Compute
from shearing.pruning.calibration.text import Calibration
from shearing.pruning.sparse.criteria import criteria
from shearing.pruning.sparse.patterns import pattern_of
from shearing.pruning.sparse.prune_layers import Method, prune_layers
from shearing.pruning.sparse.reconstruction import reconstructions
from shearing.pruning.sparse.stored.masks import unpack
from shearing.pruning.sparse.stored.pruned_layers import PrunedLayers

llmcompressor = pytest.importorskip("llmcompressor")

SAMPLES, SEQLEN, LAYERS = 16, 128, 3
CASES = [("row 0.5", 0.5, "0:0"), ("2:4", 0.5, "2:4"), ("4:8", 0.5, "4:8"), ("1:4", 0.75, "3:4")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def tokens() -> Tensor:
    return torch.randint(500, (SAMPLES, SEQLEN), generator=torch.Generator().manual_seed(0))


def theirs(folder: Path, *, modifier: Any) -> dict[str, Tensor]:
    from torch.utils.data import DataLoader

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens()]
    llmcompressor.oneshot(
        model=model,
        processor=object(),
        dataset=DataLoader(rows, batch_size=1),
        recipe=modifier,
        max_seq_length=SEQLEN,
        num_calibration_samples=SAMPLES,
        shuffle_calibration_samples=False,
    )
    return {name: weight.detach() for name, weight in model.state_dict().items()}


def output_errors(folder: Path, pruned: dict[str, Tensor]) -> dict[str, float]:
    """Squared error of each pruned matrix's outputs, on the inputs that it has in the dense model: tr(D H D^T)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    statistics: dict[str, InputStatistics] = {}
    for name in pruned:
        module = model.get_submodule(name.removesuffix(".weight"))
        needs = frozenset({"moment"})
        add = statistics.setdefault(name, InputStatistics(module.in_features, needs=needs, device=model.device)).add
        module.register_forward_pre_hook(lambda _, arguments, add=add: add(arguments[0]))
    with torch.no_grad():
        for row in tokens():
            model(row[None])
    errors = {}
    for name, weight in pruned.items():
        lost = model.get_parameter(name).detach() - weight
        errors[name] = float(((lost @ statistics[name].moment) * lost).sum())
    return errors


def ours(folder: Path, partial: Path, *, criterion: str, pattern: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    source = open_source(str(folder), revision=None, converted=partial / "converted")
    way = reconstructions()["obs" if criterion == "sparsegpt" else "none"]
    patterns = {matrix.name: pattern_of(pattern) for matrix in matrices_of(source)}
    pruned_layers = PrunedLayers(partial / "blocks")
    prune_layers(
        source,
        method=Method(criteria()[criterion], way, patterns, 0.01, true_sequential=False),
        calibration=Calibration(tokens(), "random"),
        compute=Compute(torch.device("cpu"), torch.float32, 1, "cpu", partial),
        pruned_layers=pruned_layers,
    )
    weights: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        weights |= pruned_layers.weights(layer)
        for name, bits in pruned_layers.packed_masks(layer).items():
            masks[name] = unpack(bits, shape=tuple(weights[name].shape))
    return weights, masks


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "sparsity", "pruned_of"), CASES, ids=[case[0] for case in CASES])
def test_wanda_masks_are_equal(model: Path, pattern: str, sparsity: float, pruned_of: str, tmp_path: Path) -> None:
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier

    modifier = WandaPruningModifier(
        sparsity=sparsity, mask_structure=pruned_of, targets=["Linear"], ignore=["re:.*lm_head"]
    )
    expected = theirs(model, modifier=modifier)
    _, masks = ours(model, tmp_path, criterion="wanda", pattern=pattern)
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name] != 0), name


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "sparsity", "pruned_of"), [("layer 0.5", 0.5, "0:0"), *CASES[1:]])
def test_sparsegpt_nearly_agrees(model: Path, pattern: str, sparsity: float, pruned_of: str, tmp_path: Path) -> None:
    """Rounding decides near-ties and moves later weights: masks are nearly the same, and so are errors of outputs."""
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier

    modifier = SparseGPTModifier(
        sparsity=sparsity, mask_structure=pruned_of, targets=["Linear"], ignore=["re:.*lm_head"]
    )
    expected = theirs(model, modifier=modifier)
    weights, masks = ours(model, tmp_path, criterion="sparsegpt", pattern=pattern)
    differing = sum(int((mask != (expected[name] != 0)).sum()) for name, mask in masks.items())
    assert differing < 0.01 * sum(mask.numel() for mask in masks.values())
    found = output_errors(model, {name: weights[name] for name in masks})
    errors = output_errors(model, {name: expected[name] for name in masks})
    assert found == pytest.approx(errors, rel=0.02)
    assert sum(found.values()) == pytest.approx(sum(errors.values()), rel=0.002)
