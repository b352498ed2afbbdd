"""Llama 1 to 3, and what is stored as such: SmolLM2, TinyLlama, Vicuna and others."""

from __future__ import annotations

from shearing.models.families.axes import flag
from shearing.models.families.family import Family
from shearing.models.families.norms import Norm
from shearing.models.families.sub_layers import gated_mlp, separate_attention

LLAMA = Family(
    model_type="llama",
    models="Llama 1 to 3, and what is stored as such: SmolLM 2, TinyLlama, Vicuna and others",
    attention=separate_attention(
        before=Norm("input_layernorm"), qkv_bias=flag("attention_bias"), output_bias=flag("attention_bias")
    ),
    mlp=gated_mlp(before=Norm("post_attention_layernorm"), bias=flag("mlp_bias")),
)
