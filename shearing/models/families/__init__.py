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
from shearing.models.families.matrices.gpt_neox import GPT_NEOX
from shearing.models.families.matrices.phi3 import PHI3
from shearing.models.families.matrices.seed_oss import SEED_OSS
from shearing.models.families.mistral import MISTRAL
from shearing.models.families.norms import LAYER, RMS, RMS_ONE_PLUS, RMS_WHOLE_FP32, Norm
from shearing.models.families.qwen2 import QWEN2
from shearing.models.families.qwen3 import QWEN3
from shearing.models.families.sub_layers import gated_mlp, separate_attention
from shearing.models.families.variations.gemma import GEMMA2, GEMMA3
from shearing.models.families.variations.granite import GRANITE
from shearing.models.families.variations.olmo import OLMO2, OLMO3
from shearing.models.families.variations.smollm3 import SMOLLM3

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
    "RMS_WHOLE_FP32",
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

_SHIPPED = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SEED_OSS,
    SMOLLM3,
    GRANITE,
    OLMO2,
    OLMO3,
    GEMMA2,
    GEMMA3,
    PHI3,
    GPT_NEOX,
    MIXTRAL,
    QWEN3_MOE,
    OLMOE,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _SHIPPED}
"""`config.model_type` -> family; one that a project declares for itself is added here too."""
