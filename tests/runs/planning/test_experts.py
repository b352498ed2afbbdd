"""What a plan says of models with experts: FLOPs of those that a token has, memory of every pair."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from shearing.models.families.experts.products import compute_experts_under_autocast
from shearing.models.shape import Shape
from shearing.runs.planning.hardware import forward_flops_per_token
from shearing.runs.planning.memory import Sharding
from shearing.runs.planning.step.estimate import estimate
from shearing.runs.planning.step.saved import saved_by_layer
from tests.runs.planning.test_memory import SIZES, WORKLOAD, bytes_saved, model_of

EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def config_of(**values: Any) -> Qwen3MoeConfig:
    # No other tensor has the shape of this embedding, so what is counted as one is.
    return Qwen3MoeConfig(**{**values, **EXPERTS, "vocab_size": 500})


def test_flops_are_those_torch_counts() -> None:
    config = config_of(**SIZES, num_hidden_layers=2, tie_word_embeddings=False, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config)
    compute_experts_under_autocast(model)
    tokens, shape = torch.zeros(2, 32, dtype=torch.int64), Shape.of(config)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens)
    attention = 2 * 2 * 48 * 32  # the half that causal attention can leave out, and eager does not
    norms = 2 * ((2 * 2 + 1) * 48 + 2 * 2 * 8)  # no products, but parameters
    counted = counter.get_total_flops() / tokens.numel() - attention
    assert forward_flops_per_token(shape, sequence_length=32) == counted + norms


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_saved_tensors_are_counted(precision: str) -> None:
    def saved(layers: int) -> int:
        model = model_of(config_of, layers=layers)
        compute_experts_under_autocast(model)
        return bytes_saved(
            model.to(torch.bfloat16 if precision == "bf16" else torch.float32), bf16=precision == "autocast"
        )

    workload = dataclasses.replace(WORKLOAD, bf16=precision != "fp32")
    shape = Shape.of(model_of(config_of, layers=1).config)
    counted = saved_by_layer(shape, workload=workload, weight_bytes=2 if precision == "bf16" else 4)
    assert sum(counted.values()) * workload.tokens == pytest.approx((saved(3) - saved(1)) / 2, rel=0.01)


def test_a_step_fits_into_less_with_fewer_experts() -> None:
    config = config_of(**SIZES, num_hidden_layers=4)
    whole = Shape.of(config)
    half = dataclasses.replace(whole, num_experts=4)
    more, less = (estimate(shape, workload=WORKLOAD, sharding=Sharding()) for shape in (whole, half))
    assert less.optimizer == 8 * half.num_parameters()
    assert less.total < more.total
