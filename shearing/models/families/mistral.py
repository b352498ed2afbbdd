"""Mistral: Llama without biases, with windows."""

from __future__ import annotations

from shearing.models.families.family import Family
from shearing.models.families.norms import Norm
from shearing.models.families.sub_layers import gated_mlp, separate_attention

MISTRAL = Family(
    model_type="mistral",
    models="Mistral 7B, Ministral 8B and others",
    attention=separate_attention(before=Norm("input_layernorm")),
    mlp=gated_mlp(before=Norm("post_attention_layernorm")),
)
