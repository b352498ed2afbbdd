"""Gemma 2 and the text models of Gemma 3: norms of 1 + w, before and after each sub-layer; windows in turns.

The root of the hidden size scales the embedding, so a cut changes it. Gemma 2 caps logits and scores; Gemma 3 norms the
queries and keys of each head, and has one theta for layers with windows and one for those without. Scores are scaled
by `query_pre_attn_scalar`, which no cut changes.
"""

from __future__ import annotations

import math

from shearing.models.families.axes import KV_GROUPS, QUERY_HEADS, flag
from shearing.models.families.family import Family, SubLayer
from shearing.models.families.norms import RMS_ONE_PLUS, Norm
from shearing.models.families.sub_layers import gated_mlp, separate_attention


def _attention(*inside: Norm) -> SubLayer:
    return separate_attention(
        before=Norm("input_layernorm", kind=RMS_ONE_PLUS),
        after=Norm("post_attention_layernorm", kind=RMS_ONE_PLUS),
        inside=inside,
        qkv_bias=flag("attention_bias"),
        output_bias=flag("attention_bias"),
    )


_MLP = gated_mlp(
    before=Norm("pre_feedforward_layernorm", kind=RMS_ONE_PLUS),
    after=Norm("post_feedforward_layernorm", kind=RMS_ONE_PLUS),
)

GEMMA2 = Family(
    model_type="gemma2",
    models="Gemma 2",
    attention=_attention(),
    mlp=_MLP,
    final_norm=Norm("model.norm", kind=RMS_ONE_PLUS),
    embedding_scale=math.sqrt,
    logits_cap="final_logit_softcapping",
    attention_cap="attn_logit_softcapping",
)
GEMMA3 = Family(
    model_type="gemma3_text",
    models="Gemma 3 of 270M and 1B, and the text models inside of the larger ones",
    attention=_attention(
        Norm("self_attn.q_norm", kind=RMS_ONE_PLUS, over=QUERY_HEADS, by_head=True),
        Norm("self_attn.k_norm", kind=RMS_ONE_PLUS, over=KV_GROUPS, by_head=True),
    ),
    mlp=_MLP,
    final_norm=Norm("model.norm", kind=RMS_ONE_PLUS),
    embedding_scale=math.sqrt,
    logits_cap="final_logit_softcapping",
)
