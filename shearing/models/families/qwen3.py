"""Qwen3: the queries and keys of each head are normalised; windows in some layers."""

from __future__ import annotations

from shearing.models.families.axes import KV_GROUPS, QUERY_HEADS, flag
from shearing.models.families.family import Family
from shearing.models.families.norms import Norm
from shearing.models.families.sub_layers import gated_mlp, separate_attention

QWEN3 = Family(
    model_type="qwen3",
    models="Qwen3, dense",
    attention=separate_attention(
        before=Norm("input_layernorm"),
        inside=(
            Norm("self_attn.q_norm", over=QUERY_HEADS, by_head=True),
            Norm("self_attn.k_norm", over=KV_GROUPS, by_head=True),
        ),
        qkv_bias=flag("attention_bias"),
        output_bias=flag("attention_bias"),
    ),
    mlp=gated_mlp(before=Norm("post_attention_layernorm")),
)
