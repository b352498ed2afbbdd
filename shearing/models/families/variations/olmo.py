"""OLMo 2 and 3: norms after the sub-layers alone, and over the queries and keys of all heads; OLMo 3 has windows."""

from __future__ import annotations

from dataclasses import replace

from shearing.models.families.axes import KV_GROUPS, QUERY_HEADS, flag
from shearing.models.families.family import Family
from shearing.models.families.norms import RMS_WHOLE_FP32, Norm
from shearing.models.families.sub_layers import gated_mlp, separate_attention

OLMO2 = Family(
    model_type="olmo2",
    models="OLMo 2",
    attention=separate_attention(
        before=None,
        after=Norm("post_attention_layernorm", kind=RMS_WHOLE_FP32),
        inside=(
            Norm("self_attn.q_norm", kind=RMS_WHOLE_FP32, over=QUERY_HEADS),
            Norm("self_attn.k_norm", kind=RMS_WHOLE_FP32, over=KV_GROUPS),
        ),
        qkv_bias=flag("attention_bias"),
        output_bias=flag("attention_bias"),
    ),
    mlp=gated_mlp(before=None, after=Norm("post_feedforward_layernorm", kind=RMS_WHOLE_FP32)),
    final_norm=Norm("model.norm", kind=RMS_WHOLE_FP32),
)
OLMO3 = replace(OLMO2, model_type="olmo3", models="OLMo 3")
