"""OLMoE: queries and keys are normalised over all heads at once, and clipped where the config says so.

The norm of the queries is as wide as the residual stream, and the config has no place for a head dimension: hidden size
and heads are cut together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shearing.models.families.axes import KV_GROUPS, QUERY_HEADS, flag
from shearing.models.families.experts.sub_layer import experts_mlp, sizes_with_experts, values_with_experts
from shearing.models.families.family import Family
from shearing.models.families.norms import Norm
from shearing.models.families.sub_layers import separate_attention


def sizes_of(config: Any) -> dict[str, int]:
    """Sizes of a config, whose heads share out the residual stream."""
    return {**sizes_with_experts()(config), "head_dim": config.hidden_size // config.num_attention_heads}


def values_at(values: Mapping[str, Any], *, sizes: Mapping[str, int], head_dim: int) -> dict[str, Any]:
    """A config's `values` at other sizes, without a head dimension of its own."""
    written = values_with_experts()(values, sizes=sizes, head_dim=head_dim)
    return {name: value for name, value in written.items() if name != "head_dim"}


OLMOE = Family(
    model_type="olmoe",
    models="OLMoE",
    attention=separate_attention(
        before=Norm("input_layernorm"),
        inside=(Norm("self_attn.q_norm", over=QUERY_HEADS), Norm("self_attn.k_norm", over=KV_GROUPS)),
        qkv_bias=flag("attention_bias"),
        output_bias=flag("attention_bias"),
    ),
    mlp=experts_mlp(before=Norm("post_attention_layernorm"), normalises=flag("norm_topk_prob")),
    read_sizes=sizes_of,
    write_values=values_at,
)
