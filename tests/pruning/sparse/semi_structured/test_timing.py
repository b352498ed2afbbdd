"""Ratios are those of the clock; a layer is chosen only where it gains at every number of tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shearing.pruning.sparse.semi_structured.hardware import Hardware
from shearing.pruning.sparse.semi_structured.timing import (
    CALLS,
    best_backend,
    is_faster,
    largest_error,
    layers_to_measure,
    speedup,
)
from tests.pruning.sparse.semi_structured.pretended import Converted, pretended


def layers(count: int = 3) -> list[tuple[Tensor, Tensor | None]]:
    return [(torch.randn(16, 32), None) for _ in range(count)]


def mark(weight: Tensor) -> Tensor:
    return weight.as_subclass(Converted)


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("count", [1, 3, CALLS + 2])
def test_the_speedup_is_the_clocks(tokens: int, count: int) -> None:
    def cost(weight: Tensor, tokens: int) -> float:
        return 0.5 / tokens if isinstance(weight, Converted) else 2.0

    measured = speedup(layers(count), convert=mark, tokens=tokens, hardware=pretended(cost))
    assert measured == pytest.approx(4.0 * tokens)


def test_one_slow_moment_does_not_count() -> None:
    seconds = {"number": 0}

    def cost(weight: Tensor, tokens: int) -> float:
        seconds["number"] += 1
        return 1000.0 if seconds["number"] % 211 == 0 else (1.0 if isinstance(weight, Converted) else 1.5)

    assert speedup(layers(), convert=mark, tokens=1, hardware=pretended(cost)) == pytest.approx(1.5)


def test_a_real_clock_finds_equals_about_equal() -> None:
    def stopwatch(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    here = Hardware(torch.device("cpu"), "cpu", {"same": lambda weight: weight}, stopwatch)
    measured = speedup(layers(), convert=here.converters["same"], tokens=4, hardware=here)
    assert 0.2 < measured < 5


def test_as_many_layers_take_turns_as_no_cache_holds() -> None:
    assert layers_to_measure(32, bytes_each=90 << 20) == 6
    assert layers_to_measure(32, bytes_each=1 << 20) == 32
    assert layers_to_measure(80, bytes_each=1 << 30) == 1


def test_errors_are_of_the_worst_number_of_tokens() -> None:
    layer = (torch.randn(16, 32), torch.randn(16))
    assert largest_error(layer, convert=lambda weight: weight.clone(), batches=[1, 5]) == 0
    assert largest_error((layer[0], None), convert=lambda weight: weight * 1.25, batches=[1, 5]) == pytest.approx(0.25)
    assert math.isnan(largest_error(layer, convert=lambda weight: weight * torch.nan, batches=[1, 5]))


def test_the_backend_with_the_best_worst_ratio_wins() -> None:
    assert best_backend({"a": {1: 0.5, 64: 2.0}, "b": {1: 1.1, 64: 1.2}}) == "b"
    assert best_backend({"a": {1: 1.5}, "b": {1: 1.5}}) == "a"


def test_faster_means_by_the_margin_and_everywhere() -> None:
    assert is_faster({1: 1.06, 64: 1.3}, margin=0.05)
    assert not is_faster({1: 1.05, 64: 1.3}, margin=0.05)
    assert not is_faster({1: 0.1, 64: 1.9}, margin=0.0)
    assert not is_faster({1: math.nan}, margin=0.0)
