"""The supported model families, one file each. A new one is one declaration: see `family.Family`."""

from __future__ import annotations

from shearing.models.families.axes import (
    EXPERTS,
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
from shearing.models.families.experts.mixtral import MIXTRAL
from shearing.models.families.experts.olmoe import OLMOE
from shearing.models.families.experts.qwen3_moe import QWEN3_MOE
from shearing.models.families.experts.sub_layer import experts_mlp, sizes_with_experts, values_with_experts
from shearing.models.families.family import Family, SubLayer
from shearing.models.families.llama import LLAMA
from shearing.models.families.mistral import MISTRAL
from shearing.models.families.norms import LAYER, RMS, RMS_ONE_PLUS, Norm
from shearing.models.families.qwen2 import QWEN2
from shearing.models.families.qwen3 import QWEN3
from shearing.models.families.sub_layers import gated_mlp, separate_attention

__all__ = [
    "EXPERTS",
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
    "experts_mlp",
    "flag",
    "gated_mlp",
    "linear",
    "separate_attention",
    "sizes_with_experts",
    "values_with_experts",
]

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, MIXTRAL, OLMOE, QWEN2, QWEN3, QWEN3_MOE)
}
"""`config.model_type` -> family; one that a project declares for itself is added here too."""
