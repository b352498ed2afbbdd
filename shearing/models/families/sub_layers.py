"""Sub-layers that many families have: attention with queries, keys and values apart, and the gated MLP."""

from __future__ import annotations

from shearing.models.families.axes import HIDDEN, INTERMEDIATE, KV_GROUPS, QUERY_HEADS, When, linear, never
from shearing.models.families.family import SubLayer
from shearing.models.families.norms import Norm


def separate_attention(
    *,
    before: Norm | None,
    after: Norm | None = None,
    inside: tuple[Norm, ...] = (),
    qkv_bias: When = never,
    output_bias: When = never,
) -> SubLayer:
    """Attention whose queries, keys and values have a linear layer each; arguments as of `SubLayer` and `linear`."""
    return SubLayer(
        module="self_attn",
        linears=(
            *linear("self_attn.q_proj", QUERY_HEADS, HIDDEN, bias=qkv_bias),
            *linear("self_attn.k_proj", KV_GROUPS, HIDDEN, bias=qkv_bias),
            *linear("self_attn.v_proj", KV_GROUPS, HIDDEN, bias=qkv_bias),
            *linear("self_attn.o_proj", HIDDEN, QUERY_HEADS, bias=output_bias),
        ),
        write="self_attn.o_proj",
        before=before,
        after=after,
        inside=inside,
    )


def gated_mlp(*, before: Norm | None, after: Norm | None = None, bias: When = never) -> SubLayer:
    """down(activation(gate(x)) * up(x)); arguments as of `SubLayer` and `linear`."""
    return SubLayer(
        module="mlp",
        linears=(
            *linear("mlp.gate_proj", INTERMEDIATE, HIDDEN, bias=bias),
            *linear("mlp.up_proj", INTERMEDIATE, HIDDEN, bias=bias),
            *linear("mlp.down_proj", HIDDEN, INTERMEDIATE, bias=bias),
        ),
        write="mlp.down_proj",
        before=before,
        after=after,
    )
