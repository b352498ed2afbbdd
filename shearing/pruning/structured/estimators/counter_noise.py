"""Uniform numbers that are a function of a key and a counter, made where they are used.

The counter-based generator splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014, section 5): number i is a hash of key + (i + 1) g, in integers alone, so every device makes the same bits. There
is no state, and nothing is drawn on the host or copied from it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_BITS = 23
"""Of a number: with a half added it is still exact in fp32, and neither 0 nor 1."""


def noise_key(*parts: int) -> int:
    """A key of 64 bits that belongs to these numbers alone, as a seed, a step and a draw."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniform(count: int, *, key: int, device: torch.device) -> Tensor:
    """`count` numbers of (0, 1), fp32, the same on every device.

    Args:
        count: how many; the first ones do not depend on it.
        key: see `noise_key`.
        device: where they are made; nothing waits for it.
    """
    bits = torch.arange(1, count + 1, device=device)
    bits = bits.mul_(_signed(_GAMMA)).add_(_signed(key))
    for shift, factor in _FACTORS:
        bits ^= _shifted(bits, shift)
        bits *= _signed(factor)
    bits ^= _shifted(bits, _LAST_SHIFT)
    return _shifted(bits, 64 - _BITS).to(torch.float32).add_(0.5).mul_(2.0**-_BITS)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """To the right, as if there were no sign."""
    return (bits >> places).bitwise_and_((1 << (64 - places)) - 1)


def _signed(number: int) -> int:
    """The same 64 bits as a tensor of integers has them; its products wrap around."""
    return number - (1 << 64) if number >= 1 << 63 else number
