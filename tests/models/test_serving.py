"""Sizes that other programs cannot cut as they want to are named, and others are not."""

from __future__ import annotations

from transformers import LlamaConfig

from shearing.models.serving import misfits
from shearing.models.shape import Shape


def shape(**sizes: int) -> Shape:
    fitting = {
        "vocab_size": 1000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    return Shape.of(LlamaConfig(**{**fitting, **sizes}))


def test_a_shape_that_suits_all() -> None:
    assert misfits(shape()) == []
    # Fewer KV heads than GPUs are copied.
    assert misfits(shape(num_key_value_heads=2)) == []


def test_what_does_not_suit_is_named_with_its_size() -> None:
    # 36 heads are shared out over 2 and 4; 6 KV heads over 2 alone.
    found = misfits(shape(num_attention_heads=36, num_key_value_heads=6, intermediate_size=5633, hidden_size=2052))
    assert found == [
        "tensor parallelism over 2 GPUs: no equal shares of intermediate_size 5633",
        "tensor parallelism over 4 GPUs: no equal shares of intermediate_size 5633, num_key_value_heads 6",
        (
            "tensor parallelism over 8 GPUs: no equal shares of num_attention_heads 36, intermediate_size 5633, "
            "num_key_value_heads 6"
        ),
        (
            "k-quants of llama.cpp: no multiple of 256 is hidden_size 2052, intermediate_size 5633; matrices of as "
            "many inputs are stored in another kind, which takes more bits"
        ),
        "2:4 kernels: no multiple of 64 is hidden_size 2052, intermediate_size 5633",
    ]
