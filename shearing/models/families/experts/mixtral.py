"""Mixtral: Mistral whose MLPs are experts; the weights of a token's experts add up to one."""

from __future__ import annotations

from shearing.models.families.axes import always
from shearing.models.families.experts.sub_layer import experts_mlp, sizes_with_experts, values_with_experts
from shearing.models.families.family import Family
from shearing.models.families.norms import Norm
from shearing.models.families.sub_layers import separate_attention

MIXTRAL = Family(
    model_type="mixtral",
    models="Mixtral 8x7B, 8x22B",
    attention=separate_attention(before=Norm("input_layernorm")),
    mlp=experts_mlp(
        before=Norm("post_attention_layernorm"),
        normalises=always,
        weights_in_fp32=True,
        files="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
    ),
    read_sizes=sizes_with_experts(),
    write_values=values_with_experts(),
)
