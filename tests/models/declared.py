"""Families declared outside the project, one for each thing that the shipped ones do not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from transformers import Gemma2Config, Olmo2Config, Starcoder2Config

from shearing.models.families import (
    FAMILIES,
    HIDDEN,
    INTERMEDIATE,
    KV_GROUPS,
    LAYER,
    QUERY_HEADS,
    RMS,
    RMS_ONE_PLUS,
    Family,
    Norm,
    SubLayer,
    flag,
    gated_mlp,
    linear,
    separate_attention,
)
from tests.models.tiny import CONFIGS, SIZES

GEMMA2 = Family(  # norms of 1 + w, before and after each sub-layer; an embedding scaled by the width
    model_type="gemma2",
    attention=separate_attention(
        before=Norm("input_layernorm", kind=RMS_ONE_PLUS),
        after=Norm("post_attention_layernorm", kind=RMS_ONE_PLUS),
        qkv_bias=flag("attention_bias"),
        output_bias=flag("attention_bias"),
    ),
    mlp=gated_mlp(
        before=Norm("pre_feedforward_layernorm", kind=RMS_ONE_PLUS),
        after=Norm("post_feedforward_layernorm", kind=RMS_ONE_PLUS),
    ),
    final_norm=Norm("model.norm", kind=RMS_ONE_PLUS),
    embedding_scale=lambda hidden_size: float(hidden_size**0.5),
)
WIDE_RMS = replace(RMS, gain_in_fp32=True)
OLMO2 = Family(  # norms after the sub-layers alone, and over the queries and keys of all heads
    model_type="olmo2",
    attention=separate_attention(
        before=None,
        after=Norm("post_attention_layernorm", kind=WIDE_RMS),
        inside=(
            Norm("self_attn.q_norm", kind=WIDE_RMS, over=QUERY_HEADS),
            Norm("self_attn.k_norm", kind=WIDE_RMS, over=KV_GROUPS),
        ),
        qkv_bias=flag("attention_bias"),
        output_bias=flag("attention_bias"),
    ),
    mlp=gated_mlp(before=None, after=Norm("post_feedforward_layernorm", kind=WIDE_RMS)),
    final_norm=Norm("model.norm", kind=WIDE_RMS),
)
STARCODER2 = Family(  # layer norms with biases, and an MLP without a gate
    model_type="starcoder2",
    attention=separate_attention(
        before=Norm("input_layernorm", kind=LAYER, bias=True), qkv_bias=flag("use_bias"), output_bias=flag("use_bias")
    ),
    mlp=SubLayer(
        module="mlp",
        linears=(
            *linear("mlp.c_fc", INTERMEDIATE, HIDDEN, bias=flag("use_bias")),
            *linear("mlp.c_proj", HIDDEN, INTERMEDIATE, bias=flag("use_bias")),
        ),
        write="mlp.c_proj",
        before=Norm("post_attention_layernorm", kind=LAYER, bias=True),
    ),
    final_norm=Norm("model.norm", kind=LAYER, bias=True),
)

DECLARED = {family.model_type: family for family in (GEMMA2, OLMO2, STARCODER2)}
DECLARED_CONFIGS: dict[str, Callable[..., Any]] = {
    "gemma2": lambda **kw: Gemma2Config(**{"sliding_window": 4, **SIZES, **kw}),
    "gemma2-biases": lambda **kw: Gemma2Config(**{"sliding_window": 4, "attention_bias": True, **SIZES, **kw}),
    "olmo2": lambda **kw: Olmo2Config(**{"pad_token_id": None, **SIZES, **kw}),
    "starcoder2": lambda **kw: Starcoder2Config(**{**SIZES, **kw}),
}


@contextmanager
def declared_families() -> Iterator[None]:
    """Has the project know these families, and `tiny_model` their configs, while the context lasts."""
    with pytest.MonkeyPatch.context() as patch:
        for model_type, family in DECLARED.items():
            patch.setitem(FAMILIES, model_type, family)
        for name, config in DECLARED_CONFIGS.items():
            patch.setitem(CONFIGS, name, config)
        yield
