"""Granite 3: Llama with multipliers of the embedding, of what is added to the residual stream, of scores and of logits.

The embedding's and the scores' are constants of the model's own forward pass, which no cut changes. All of them stay in
the config.
"""

from __future__ import annotations

from shearing.models.families.axes import flag
from shearing.models.families.family import Family
from shearing.models.families.norms import Norm
from shearing.models.families.sub_layers import gated_mlp, separate_attention

GRANITE = Family(
    model_type="granite",
    models="Granite 3.0 to 3.3, dense",
    attention=separate_attention(
        before=Norm("input_layernorm"), qkv_bias=flag("attention_bias"), output_bias=flag("attention_bias")
    ),
    mlp=gated_mlp(before=Norm("post_attention_layernorm"), bias=flag("mlp_bias")),
    residual_multiplier="residual_multiplier",
    logits_divisor="logits_scaling",
)
