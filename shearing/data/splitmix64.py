"""SplitMix64 (Steele, Lea and Flood 2014): words as good as random that are a function of others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

INCREMENT = 0x9E3779B97F4A7C15
"""The odd number nearest to 2^64 over the golden ratio."""


def mixed(words: Words) -> Words:
    """The finaliser: a bijection of 64-bit words that wraps around; [B] -> [B]."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: Words = words ^ (words >> np.uint64(31))
    return result
