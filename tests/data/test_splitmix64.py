"""SplitMix64 as published, on which splits and the order of samples rest."""

from __future__ import annotations

import numpy as np
import pytest

from shearing.data.splitmix64 import INCREMENT, mixed


def test_the_published_sequence() -> None:
    """The first numbers of the generator with seed 1234567, of the reference implementation (Vigna, splitmix64.c)."""
    states = np.array([(1234567 + INCREMENT * (step + 1)) % 2**64 for step in range(3)], dtype=np.uint64)
    with np.errstate(over="ignore"):
        found = mixed(states)
    assert found.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_different_words_stay_different(size: int) -> None:
    with np.errstate(over="ignore"):
        assert len(set(mixed(np.arange(size, dtype=np.uint64)).tolist())) == size
