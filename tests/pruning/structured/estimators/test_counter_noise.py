"""Noise of masks: the published generator, whatever is asked for with it, and uniform."""

from __future__ import annotations

import torch

from shearing.pruning.structured.estimators.counter_noise import noise_key, uniform

CPU = torch.device("cpu")
MASK = (1 << 64) - 1


def _splitmix64(key: int, count: int) -> list[int]:
    """The generator as its authors give it, in Python's integers."""
    state, found = key, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(z ^ (z >> 31))
    return found


def test_the_oracle_gives_the_published_numbers() -> None:
    # The first ones of seed 1234567, as reference implementations have them.
    assert _splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]


def test_numbers_are_those_of_the_generator_bit_for_bit() -> None:
    for key in (0, 1, noise_key(3, 1, 4), MASK):
        expected = [((number >> 41) + 0.5) / 2**23 for number in _splitmix64(key, 500)]
        assert uniform(500, key=key, device=CPU).tolist() == expected


def test_numbers_belong_to_their_place_and_key() -> None:
    key = noise_key(17, 3, 0)
    assert torch.equal(uniform(1000, key=key, device=CPU)[:10], uniform(10, key=key, device=CPU))
    keys = {noise_key(*parts) for parts in ((17, 3, 0), (17, 3, 1), (17, 30, 1), (1, 73, 0))}
    assert len(keys) == 4


def test_numbers_are_uniform_and_independent() -> None:
    """Each bound is five standard deviations of what it is of."""
    count = 1 << 18
    numbers = uniform(count, key=noise_key(1, 2, 3), device=CPU).double()
    assert float(numbers.min()) > 0
    assert float(numbers.max()) < 1
    in_bins = torch.histc(numbers, bins=64, min=0, max=1)
    assert float((in_bins - count / 64).abs().max()) < 5 * (count / 64) ** 0.5
    centred = numbers - 0.5
    for other in (centred[1:], uniform(count, key=noise_key(1, 2, 4), device=CPU).double()[1:] - 0.5):
        assert abs(float((centred[:-1] * other).mean())) < 5 / 12 / count**0.5
