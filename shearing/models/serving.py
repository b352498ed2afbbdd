"""What other programs want of a model's sizes: multiples that they share matrices out by, or store them in."""

from __future__ import annotations

from collections.abc import Mapping

from shearing.models.shape import Shape

TENSOR_PARALLEL = (2, 4, 8)
"""GPUs that servers usually share a model out over."""
BLOCK = 32
"""Inputs of a row that the plainest quantised kinds store together: without such multiples there are none."""
K_QUANT_BLOCK = 256
"""Inputs of a row that llama.cpp's k-quants store together."""
TWO_OF_FOUR = 64
"""Inputs and outputs that every kernel for 2:4 matrices takes, and that dense ones are fastest at."""


def misfits(shape: Shape) -> list[str]:
    """What about a shape does not suit tensor parallelism, k-quants and 2:4 kernels, a sentence each; none: nothing."""
    found = []
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    for ways in TENSOR_PARALLEL:
        wrong = _no_multiples({"num_attention_heads": heads, "intermediate_size": shape.intermediate_size}, of=ways)
        # Where there are fewer KV heads than GPUs, servers give each GPU a copy of one.
        wrong += [f"num_key_value_heads {groups}"] if groups % ways and ways % groups else []
        if wrong:
            found.append(f"tensor parallelism over {ways} GPUs: no equal shares of {', '.join(wrong)}")
    inputs = {
        "hidden_size": shape.hidden_size,
        "attention's output": heads * shape.head_dim,
        "intermediate_size": shape.intermediate_size,
    }
    if wrong := _no_multiples(inputs, of=K_QUANT_BLOCK):
        found.append(
            f"k-quants of llama.cpp: no multiple of {K_QUANT_BLOCK} is {', '.join(wrong)}; matrices of as many inputs "
            "are stored in another kind, which takes more bits"
        )
    if wrong := _no_multiples({**inputs, "keys and values": groups * shape.head_dim}, of=TWO_OF_FOUR):
        found.append(f"2:4 kernels: no multiple of {TWO_OF_FOUR} is {', '.join(wrong)}")
    return found


def _no_multiples(sizes: Mapping[str, int], *, of: int) -> list[str]:
    return [f"{name} {size}" for name, size in sizes.items() if size % of]
