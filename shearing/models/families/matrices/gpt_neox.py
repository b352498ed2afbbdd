"""GPT-NeoX and Pythia: layer norms with biases, an MLP without a gate, and all that a head reads in one place.

The rows of `query_key_value` are a head's queries, keys and values, then the next head's. There are no grouped queries,
and no place in the config for a head dimension: it is the hidden size over the heads, so both are cut together. Unless
the config says otherwise, attention and MLP read the same residual stream, each by a norm of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shearing.models.families.axes import HIDDEN, INTERMEDIATE, QUERY_HEADS, Axis, always, flag, linear
from shearing.models.families.family import Family, SubLayer
from shearing.models.families.norms import LAYER, Norm


def sizes_of(config: Any) -> dict[str, int]:
    """Sizes of a config: every head is a KV group."""
    heads = config.num_attention_heads
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": config.hidden_size // heads,
        "vocab_size": config.vocab_size,
    }


def values_at(values: Mapping[str, Any], *, sizes: Mapping[str, int], head_dim: int) -> dict[str, Any]:
    """A config's `values` at other sizes; it has no names for KV heads and the head dimension."""
    del head_dim
    return {**values, **{name: size for name, size in sizes.items() if name != "num_key_value_heads"}}


GPT_NEOX = Family(
    model_type="gpt_neox",
    models="GPT-NeoX, Pythia",
    attention=SubLayer(
        module="attention",
        linears=(
            *linear(
                "attention.query_key_value",
                Axis(("query_heads", "kv_groups", "kv_groups"), by_group=True),
                HIDDEN,
                bias=flag("attention_bias"),
            ),
            *linear("attention.dense", HIDDEN, QUERY_HEADS, bias=flag("attention_bias")),
        ),
        write="attention.dense",
        before=Norm("input_layernorm", kind=LAYER, bias=True),
    ),
    mlp=SubLayer(
        module="mlp",
        linears=(
            *linear("mlp.dense_h_to_4h", INTERMEDIATE, HIDDEN, bias=always),
            *linear("mlp.dense_4h_to_h", HIDDEN, INTERMEDIATE, bias=always),
        ),
        write="mlp.dense_4h_to_h",
        before=Norm("post_attention_layernorm", kind=LAYER, bias=True),
    ),
    backbone="gpt_neox",
    layers="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    stored_head="embed_out",
    final_norm=Norm("gpt_neox.final_layer_norm", kind=LAYER, bias=True),
    side_by_side=flag("use_parallel_residual"),
    read_sizes=sizes_of,
    write_values=values_at,
)
