"""Qwen3 with experts: attention is Qwen3's; MLPs in between that are no experts are not supported."""

from __future__ import annotations

from typing import Any

from shearing.models.families.axes import flag
from shearing.models.families.experts.sub_layer import experts_mlp, sizes_with_experts, values_with_experts
from shearing.models.families.family import Family
from shearing.models.families.norms import Norm
from shearing.models.families.qwen3 import QWEN3


def dense_layers(config: Any) -> str | None:
    """What is said of a config some of whose MLPs are no experts; None where all are."""
    if config.decoder_sparse_step == 1 and not config.mlp_only_layers:
        return None
    return (
        f"decoder_sparse_step {config.decoder_sparse_step} and mlp_only_layers {config.mlp_only_layers}: "
        "only models whose MLPs are all experts are cut (1 and none)"
    )


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    models="Qwen3 with experts, as Qwen3-30B-A3B",
    attention=QWEN3.attention,
    mlp=experts_mlp(before=Norm("post_attention_layernorm"), normalises=flag("norm_topk_prob")),
    read_sizes=sizes_with_experts(units="moe_intermediate_size"),
    write_values=values_with_experts(units="moe_intermediate_size"),
    refuses=dense_layers,
)
