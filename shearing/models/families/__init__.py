"""The supported model families, one file each. A new one is one declaration: see `family.Family`."""

from __future__ import annotations

from shearing.models.families.axes import (
    HIDDEN,
    INTERMEDIATE,
    KV_GROUPS,
    QUERY_HEADS,
    VOCABULARY,
    Axis,
    Parameter,
    always,
    flag,
    linear,
)
from shearing.models.families.family import Family, SubLayer
from shearing.models.families.llama import LLAMA
from shearing.models.families.matrices.gpt_neox import GPT_NEOX
from shearing.models.families.matrices.phi3 import PHI3
from shearing.models.families.matrices.seed_oss import SEED_OSS
from shearing.models.families.mistral import MISTRAL
from shearing.models.families.norms import LAYER, RMS, RMS_ONE_PLUS, Norm
from shearing.models.families.qwen2 import QWEN2
from shearing.models.families.qwen3 import QWEN3
from shearing.models.families.sub_layers import gated_mlp, separate_attention

__all__ = [
    "FAMILIES",
    "HIDDEN",
    "INTERMEDIATE",
    "KV_GROUPS",
    "LAYER",
    "QUERY_HEADS",
    "RMS",
    "RMS_ONE_PLUS",
    "VOCABULARY",
    "Axis",
    "Family",
    "Norm",
    "Parameter",
    "SubLayer",
    "always",
    "flag",
    "gated_mlp",
    "linear",
    "separate_attention",
]

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (GPT_NEOX, LLAMA, MISTRAL, PHI3, QWEN2, QWEN3, SEED_OSS)
}
"""`config.model_type` -> family; one that a project declares for itself is added here too."""
