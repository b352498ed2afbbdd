"""Speed: sensible figures, turns, and what is said about them."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shearing.evaluation.environment import environment
from shearing.evaluation.speed import measure_speed


def model_of(num_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def test_a_model_with_many_more_layers_is_slower() -> None:
    models = {"small": model_of(1), "large": model_of(12)}
    models["small"].train()
    turns: list[None] = []

    speeds = measure_speed(
        models, prompt_tokens=16, decode_context=4, decode_tokens=4, repetitions=3, progress=lambda: turns.append(None)
    )

    assert len(turns) == 2 * (3 + 1)
    assert speeds["small"].prefill_tokens_per_second > speeds["large"].prefill_tokens_per_second > 0
    assert 0 < speeds["small"].decode_milliseconds < speeds["large"].decode_milliseconds
    assert models["small"].training
    assert speeds["small"].device == "cpu"
    assert speeds["small"].dtype == "float32"
    assert speeds["small"].threads == torch.get_num_threads()


def test_the_environment_names_versions_and_device() -> None:
    found = environment(torch.device("cpu"))

    assert found["torch"] == torch.__version__
    assert found["device"] == "cpu"
