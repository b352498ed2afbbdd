"""Tiny models whose MLPs are experts, and masks on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from shearing.models.masked import Masks
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import as_masks, unit_sizes
from tests.models.test_exactness import random_mask
from tests.models.tiny import CONFIGS, SCALED_ROPE, SIZES

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
OF_QWEN3 = {**SIZES, **EXPERTS, "hidden_size": 40, "moe_intermediate_size": 24, "norm_topk_prob": True}
# Heads share out the residual stream, and are as many groups.
OF_OLMOE = {**SIZES, **EXPERTS, "intermediate_size": 24, "hidden_size": 48, "pad_token_id": None, "eos_token_id": None}
OF_MIXTRAL = {**SIZES, "num_local_experts": 6, "hidden_size": 40, "intermediate_size": 24}
EXPERT_CONFIGS: dict[str, Callable[..., Any]] = {
    "mixtral": lambda **kw: MixtralConfig(**OF_MIXTRAL | {"sliding_window": 4} | kw),
    "qwen3_moe": lambda **kw: Qwen3MoeConfig(**OF_QWEN3 | kw),
    "qwen3_moe-rope": lambda **kw: Qwen3MoeConfig(
        **OF_QWEN3 | {"norm_topk_prob": False, "rope_parameters": SCALED_ROPE, "attention_bias": True} | kw
    ),
    "olmoe": lambda **kw: OlmoeConfig(**OF_OLMOE | kw),
    "olmoe-clipped": lambda **kw: OlmoeConfig(**OF_OLMOE | {"clip_qkv": 1.0, "norm_topk_prob": True} | kw),
}
GRANULARITIES = ("layers", "kv_groups", "query_heads", "intermediate", "experts", "hidden")
KEPT = {"layers": 2, "attention": 2, "mlp": 2, "kv_groups": 2, "query_heads": 1, "intermediate": 16, "experts": 3}
SUBSETS = [subset for size in range(1, 7) for subset in combinations(GRANULARITIES, size)]


def subsets_of(family: str) -> list[tuple[str, ...]]:
    """Those that its config can hold: OLMoE's heads share out the residual stream."""
    if not family.startswith("olmoe"):
        return SUBSETS
    heads = {"kv_groups", "query_heads"}
    return [subset for subset in SUBSETS if bool(heads & set(subset)) == ("hidden" in subset)]


@contextmanager
def expert_configs() -> Iterator[None]:
    """Has `tiny_model` know these configs while the context lasts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, config in EXPERT_CONFIGS.items():
            patch.setitem(CONFIGS, name, config)
        yield


def masks_and_target(
    source: Shape, granularities: Sequence[str], *, fractional: bool, seed: int
) -> tuple[Masks, Shape]:
    """Masks that keep so many units of each row, and the shape that they leave."""
    generator = torch.Generator().manual_seed(seed)
    groups = 2 if "kv_groups" in granularities else source.num_key_value_heads
    heads = groups * (1 if "query_heads" in granularities else source.query_heads_per_group)
    kept = {**KEPT, "hidden": heads * source.head_dim if source.family.model_type == "olmoe" else 24}
    target = dataclasses.replace(
        source,
        num_hidden_layers=2 if "layers" in granularities else source.num_hidden_layers,
        hidden_size=kept["hidden"] if "hidden" in granularities else source.hidden_size,
        intermediate_size=16 if "intermediate" in granularities else source.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        num_experts=3 if "experts" in granularities else source.num_experts,
    )
    sizes = unit_sizes(source)
    z: dict[str, Tensor] = {
        name: random_mask(sizes[name], keep=kept[name], fractional=fractional, generator=generator)
        for name in granularities
    }
    return as_masks(z), target
