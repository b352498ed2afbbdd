"""What stands in the way of exporting layers of different sizes; fails on the day that it is gone."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def test_no_llama_of_transformers_has_sizes_by_layer() -> None:
    try:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, per_layer_config={0: {"intermediate_size": 16}}))
    except RuntimeError:  # "'intermediate_size' is a per-layer attribute": its code asks for the one of all layers
        return
    sizes = {layer.mlp.up_proj.out_features for layer in model.model.layers}
    assert len(sizes) == 1, "transformers can hold sizes by layer now: export what masks under a budget leave so"
