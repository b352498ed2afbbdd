"""Qwen2 and Qwen2.5: queries, keys and values always have biases; windows in some layers."""

from __future__ import annotations

from shearing.models.families.axes import always
from shearing.models.families.family import Family
from shearing.models.families.norms import Norm
from shearing.models.families.sub_layers import gated_mlp, separate_attention

QWEN2 = Family(
    model_type="qwen2",
    models="Qwen2, Qwen2.5",
    attention=separate_attention(before=Norm("input_layernorm"), qkv_bias=always),
    mlp=gated_mlp(before=Norm("post_attention_layernorm")),
)
