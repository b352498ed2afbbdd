"""Peaks by what drivers call GPUs, and FLOPs counted by hand and by torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from shearing.errors import ShearingError
from shearing.models.families.llama import LLAMA
from shearing.models.shape import Shape
from shearing.objectives.recipe import DistillRecipe
from shearing.pruning.structured.importance.metric import Cost
from shearing.runs.planning.hardware import (
    GPUS,
    Hardware,
    flops_of,
    forward_flops_per_token,
    gpu_of,
    peak_flops,
    teacher_flops_per_token,
    training_flops_per_token,
)
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model

SHAPE = Shape(
    family=LLAMA.of(LlamaConfig()),
    num_hidden_layers=3,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=100,
    tied=False,
)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("h100", 989.4e12),
        ("Tesla V100-SXM2-32GB", None),  # bf16 only emulated
        ("Tesla T4", None),
        ("NVIDIA A10G", None),  # a cut of its own
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name, precision=torch.bfloat16) == peak


def test_other_precisions() -> None:
    assert peak_flops("Tesla V100-SXM2-16GB", precision=torch.float16) == 125e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", precision=torch.float32) == 19.5e12
    assert peak_flops("NVIDIA B200", precision=torch.float32) is None
    assert peak_flops("NVIDIA H100 PCIe", precision=torch.float64) is None


def test_every_row_is_found_by_its_own_name_and_has_a_source() -> None:
    for gpu in GPUS:
        assert gpu_of(gpu.name) is gpu
        assert gpu.source.startswith("https://")
        assert all(1e12 < peak < 1e16 for peak in gpu.peak.values())


def test_sizes_tell_rows_apart() -> None:
    sizes = {name: gpu_of(name) for name in ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "A100")}
    assert [gpu and gpu.memory for gpu in sizes.values()] == [40 * 10**9, 80 * 10**9, None]


def test_flops_are_those_torch_counts() -> None:
    from transformers import LlamaForCausalLM

    tokens = torch.zeros(2, 32, dtype=torch.int64)
    # Eager attention, because torch does not count a CPU's fused one.
    config = LlamaConfig(
        **SHAPE.sizes(), vocab_size=100, head_dim=16, tie_word_embeddings=False, attn_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter:
        LlamaForCausalLM(config)(input_ids=tokens)
    attention = (
        2 * SHAPE.num_hidden_layers * 64 * 32
    )  # the half that causal attention can leave out, and eager does not
    counted = counter.get_total_flops() / tokens.numel() - attention
    norms = 2 * (2 * SHAPE.num_hidden_layers + 1) * SHAPE.hidden_size  # no products, but parameters
    assert forward_flops_per_token(SHAPE, sequence_length=32) == counted + norms


@pytest.mark.parametrize("family", CONFIGS)
def test_flops_of_every_family_are_those_torch_counts(family: str) -> None:
    model, ids = tiny_model(family, tied=family != "qwen2", attn_implementation="eager"), tiny_ids()
    shape, (_, length) = Shape.of(model.config), ids.shape
    with FlopCounterMode(display=False) as counted:
        model(ids, use_cache=False)
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    # Torch counts matrices alone, and with explicit attention all scores, those of later tokens too.
    later = 2 * shape.num_hidden_layers * shape.units()["query_heads"] * length
    said = forward_flops_per_token(shape, sequence_length=length) - 2 * vectors + later
    assert counted.get_total_flops() == said * ids.numel()


def test_training_is_three_forward_passes_and_an_embedding_is_looked_up() -> None:
    untied = training_flops_per_token(SHAPE, sequence_length=0)
    assert untied == 6 * (SHAPE.num_parameters() - 100 * 64)
    tied = dataclasses.replace(SHAPE, tied=True)
    assert training_flops_per_token(tied, sequence_length=0) == 6 * tied.num_parameters() == untied
    per_position = training_flops_per_token(SHAPE, sequence_length=1) - untied
    assert per_position == 6 * SHAPE.num_hidden_layers * 64


def test_what_is_differentiated_costs_as_training_does() -> None:
    trained = 10 * training_flops_per_token(SHAPE, sequence_length=32)
    assert flops_of(Cost(forward_tokens=10, backward_tokens=10), SHAPE, sequence_length=32) == pytest.approx(trained)
    read = 10 * forward_flops_per_token(SHAPE, sequence_length=32)
    assert flops_of(Cost(forward_tokens=10, other_flops=7.0), SHAPE, sequence_length=32) == pytest.approx(read + 7.0)


@pytest.mark.parametrize("gigabytes", [0.0, -1.0, float("inf"), float("nan")])
def test_memory_that_no_gpu_has_is_refused(gigabytes: float) -> None:
    with pytest.raises(ShearingError, match="--memory"):
        Hardware.of(processes=1, gpu="H100", gigabytes=gigabytes, mfu=0.4)


def test_a_teacher_that_chooses_tokens_multiplies_its_head_twice() -> None:
    shape = SHAPE
    plain, by_entropy = DistillRecipe(), DistillRecipe(skip_low_entropy=0.25)
    once = teacher_flops_per_token(shape, distill=plain, sequence_length=16)
    assert once == forward_flops_per_token(shape, sequence_length=16)
    again = teacher_flops_per_token(shape, distill=by_entropy, sequence_length=16) - once
    assert again == 2 * shape.vocab_size * shape.hidden_size
    assert teacher_flops_per_token(None, distill=None, sequence_length=16) == 0
    cached = DistillRecipe(cache=Path("cache"))
    assert teacher_flops_per_token(shape, distill=cached, sequence_length=16) == 0
