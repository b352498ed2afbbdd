"""Tiny random models of every supported family, with weights large enough that every part of them matters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
)

VOCAB_SIZE = 97
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0],
}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
WINDOWS = ["sliding_attention", "full_attention"] * 2
GRANITE_SCALES = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.0,
}
CONFIGS = {
    "llama": lambda **kw: LlamaConfig(**SIZES | kw),
    "llama-mha": lambda **kw: LlamaConfig(**SIZES | {"num_key_value_heads": 6} | kw),
    "llama-biases": lambda **kw: LlamaConfig(**SIZES | {"attention_bias": True, "mlp_bias": True} | kw),
    "llama-rope-scaling": lambda **kw: LlamaConfig(**SIZES | {"rope_parameters": SCALED_ROPE} | kw),
    "mistral": lambda **kw: MistralConfig(**SIZES | {"sliding_window": 4} | kw),
    "qwen2": lambda **kw: Qwen2Config(**SIZES | kw),
    "qwen2-sliding": lambda **kw: Qwen2Config(
        **SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2} | kw
    ),
    "qwen3": lambda **kw: Qwen3Config(**SIZES | kw),
    "phi3": lambda **kw: Phi3Config(**SIZES | {"pad_token_id": None} | kw),
    # Their configs work out the head dimension of 8 from the width.
    "phi3-longrope": lambda **kw: Phi3Config(
        **SIZES
        | {"hidden_size": 48, "rope_parameters": dict(LONG_ROPE), "original_max_position_embeddings": 8}
        | {"pad_token_id": None}
        | kw
    ),
    "seed_oss": lambda **kw: SeedOssConfig(**SIZES | {"pad_token_id": None, "attention_out_bias": True} | kw),
    "gpt_neox": lambda **kw: _gpt_neox(use_parallel_residual=True, **kw),
    "gpt_neox-in-turn": lambda **kw: _gpt_neox(use_parallel_residual=False, **kw),
    "smollm3": lambda **kw: SmolLM3Config(
        **SIZES
        | {
            "pad_token_id": None,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 4,
            "mlp_bias": True,
        }
        | kw
    ),
    "granite": lambda **kw: GraniteConfig(**SIZES | GRANITE_SCALES | kw),
    "olmo2": lambda **kw: Olmo2Config(**SIZES | {"pad_token_id": None} | kw),
    "olmo3": lambda **kw: Olmo3Config(
        **SIZES | {"pad_token_id": None, "sliding_window": 4, "attention_bias": True, "rope_parameters": TWO_ROPES} | kw
    ),
    "gemma2": lambda **kw: Gemma2Config(**SIZES | {"sliding_window": 4, "final_logit_softcapping": 5.0} | kw),
    "gemma3": lambda **kw: Gemma3TextConfig(
        **SIZES
        | {"sliding_window": 4, "layer_types": WINDOWS, "attention_bias": True, "final_logit_softcapping": 5.0}
        | kw
    ),
}
"""Where a family has flags, some config has what they switch on."""


def _gpt_neox(**changes: Any) -> GPTNeoXConfig:
    values = SIZES | {"hidden_size": 48, "rotary_pct": 0.5} | changes
    return GPTNeoXConfig(**{name: value for name, value in values.items() if name in GPT_NEOX_NAMES})


GPT_NEOX_NAMES = {*vars(GPTNeoXConfig()), "rotary_pct", "use_parallel_residual", "attn_implementation"}


def tiny_model(family: str = "llama", *, tied: bool = True, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A random model of a key of `CONFIGS`, its settings but for those given, fp32, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](tie_word_embeddings=tied, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            mean = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_ids(*, sequences: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token ids [sequences, length]."""
    return torch.randint(VOCAB_SIZE, (sequences, length), generator=torch.Generator().manual_seed(seed))
