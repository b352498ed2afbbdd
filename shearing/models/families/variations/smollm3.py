"""SmolLM3: Llama with some layers, every fourth in the published models, that attend without positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shearing.models.families.axes import flag
from shearing.models.families.family import Family, standard_values
from shearing.models.families.norms import Norm
from shearing.models.families.sub_layers import gated_mlp, separate_attention


def _values(values: Mapping[str, Any], *, sizes: Mapping[str, int], head_dim: int) -> dict[str, Any]:
    """The interval is said again where the layers that stay keep one; `no_rope_layers` decides all the same."""
    changed = standard_values(values, sizes=sizes, head_dim=head_dim)
    turns = [bool(turn) for turn in changed["no_rope_layers"]]
    for interval in range(1, len(turns) + 2):
        if turns == [(layer + 1) % interval != 0 for layer in range(len(turns))]:
            changed["no_rope_layer_interval"] = interval
    return changed


SMOLLM3 = Family(
    model_type="smollm3",
    models="SmolLM3",
    attention=separate_attention(
        before=Norm("input_layernorm"), qkv_bias=flag("attention_bias"), output_bias=flag("attention_bias")
    ),
    mlp=gated_mlp(before=Norm("post_attention_layernorm"), bias=flag("mlp_bias")),
    per_layer=("layer_types", "no_rope_layers"),
    write_values=_values,
)
