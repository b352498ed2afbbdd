"""Seed-OSS: Llama with any number of heads, and biases that queries, keys and values have apart from the output."""

from __future__ import annotations

from shearing.models.families.axes import flag
from shearing.models.families.family import Family
from shearing.models.families.norms import Norm
from shearing.models.families.sub_layers import gated_mlp, separate_attention

SEED_OSS = Family(
    model_type="seed_oss",
    models="Seed-OSS",
    attention=separate_attention(
        before=Norm("input_layernorm"), qkv_bias=flag("attention_bias"), output_bias=flag("attention_out_bias")
    ),
    mlp=gated_mlp(before=Norm("post_attention_layernorm"), bias=flag("mlp_bias")),
)
