"""Llama 1 to 3, and what is stored as such: SmolLM2, TinyLlama, Vicuna and others.

LlamaConfig refuses heads that do not divide the hidden size. The same layers are those of a Mistral without windows, or
where there are biases of a Seed-OSS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shearing.models.families.axes import flag
from shearing.models.families.family import Family
from shearing.models.families.norms import Norm
from shearing.models.families.sub_layers import gated_mlp, separate_attention

_OWN = ("architectures", "attention_bias", "mlp_bias", "pretraining_tp")
"""Names of a Llama's config that a Mistral's has not."""


def as_mistral(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """A Llama without biases as a Mistral."""
    if values.get("attention_bias") or values.get("mlp_bias"):
        return None
    kept = {name: value for name, value in values.items() if name not in _OWN}
    return {**kept, "model_type": "mistral", "sliding_window": None}


def as_seed_oss(values: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama with biases as a Seed-OSS, whose output projection has a flag of its own."""
    kept = {name: value for name, value in values.items() if name != "architectures"}
    bias = bool(values.get("attention_bias"))
    return {**kept, "model_type": "seed_oss", "attention_out_bias": bias, "residual_dropout": 0.0}


LLAMA = Family(
    model_type="llama",
    models="Llama 1 to 3, and what is stored as such: SmolLM 2, TinyLlama, Vicuna and others",
    attention=separate_attention(
        before=Norm("input_layernorm"), qkv_bias=flag("attention_bias"), output_bias=flag("attention_bias")
    ),
    mlp=gated_mlp(before=Norm("post_attention_layernorm"), bias=flag("mlp_bias")),
    holders=(as_mistral, as_seed_oss),
)
