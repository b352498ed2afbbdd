"""Phi-3, Phi-3.5 and Phi-4: queries, keys and values are one matrix, gate and up another.

Of each head the first `partial_rotary_factor` of its dimensions are rotated; `longrope` has a factor for each pair of
them. Neither changes when heads go, as a head keeps its dimensions. Phi3Config counts them from hidden size and heads,
though: a target with longrope keeps about as many dimensions of the residual stream for each head as the source.
"""

from __future__ import annotations

from shearing.models.families.axes import HIDDEN, INTERMEDIATE, QUERY_HEADS, Axis, linear
from shearing.models.families.family import Family, SubLayer
from shearing.models.families.norms import Norm

PHI3 = Family(
    model_type="phi3",
    models="Phi-3, Phi-3.5 mini, Phi-4, dense",
    attention=SubLayer(
        module="self_attn",
        linears=(
            *linear("self_attn.qkv_proj", Axis(("query_heads", "kv_groups", "kv_groups")), HIDDEN),
            *linear("self_attn.o_proj", HIDDEN, QUERY_HEADS),
        ),
        write="self_attn.o_proj",
        before=Norm("input_layernorm"),
    ),
    mlp=SubLayer(
        module="mlp",
        linears=(
            *linear("mlp.gate_up_proj", Axis(("intermediate", "intermediate")), HIDDEN),
            *linear("mlp.down_proj", HIDDEN, INTERMEDIATE),
        ),
        write="mlp.down_proj",
        before=Norm("post_attention_layernorm"),
    ),
)
