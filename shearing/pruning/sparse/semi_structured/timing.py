"""Whether a 2:4 layer is faster than the dense one, on this device, with so many tokens at a time.

Legend: O outputs, I inputs of a layer, T tokens that go through it at once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from shearing.pruning.sparse.semi_structured.hardware import Hardware, relative_error

COLD_BYTES = 1 << 29
"""Weights that take turns in a measurement: more than a GPU's cache holds, as in a model."""

CALLS, WARM_UP, REPETITIONS = 10, 5, 21
Layer = tuple[Tensor, Tensor | None]
"""Weight [O, I] and bias [O] of a linear layer."""


def layers_to_measure(num_layers: int, *, bytes_each: int) -> int:
    """How many layers of one shape take turns: until no cache holds them, or all there are."""
    return min(num_layers, max(1, math.ceil(COLD_BYTES / bytes_each)))


@torch.no_grad()
def speedup(layers: Sequence[Layer], *, convert: Callable[[Tensor], Tensor], tokens: int, hardware: Hardware) -> float:
    """Seconds of dense layers over seconds of the same layers converted: above 1, 2:4 is faster.

    The layers take turns, dense and converted passes too; each pass is a row of calls, as a model that is not compiled
    makes them, so what a call costs before the GPU begins counts. Medians of `REPETITIONS` after `WARM_UP`.

    Args:
        layers: of one shape, on the device, in the dtype of the activations.
        convert: dense 2:4 weight to the one that is tried.
        tokens: T.
        hardware: whose stopwatch is used.
    """
    converted = [(convert(weight), bias) for weight, bias in layers]
    weight = layers[0][0]
    inputs_1TI = torch.randn(1, tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)
    rounds = math.ceil(CALLS / len(layers))

    def passes(through: Sequence[Layer]) -> None:
        for _ in range(rounds):
            for weight, bias in through:
                linear(inputs_1TI, weight, bias)

    seconds: dict[str, list[float]] = {"dense": [], "converted": []}
    for repetition in range(WARM_UP + REPETITIONS):
        for name, through in (("dense", layers), ("converted", converted)):
            spent = hardware.stopwatch(partial(passes, through))
            if repetition >= WARM_UP:
                seconds[name].append(spent)
    return statistics.median(seconds["dense"]) / statistics.median(seconds["converted"])


@torch.no_grad()
def largest_error(layer: Layer, *, convert: Callable[[Tensor], Tensor], batches: Iterable[int]) -> float:
    """Relative error of a converted layer's results at the worst of several T; NaN if one is not finite."""
    weight, bias = layer
    converted = convert(weight)
    errors = []
    for tokens in batches:
        inputs_1TI = torch.randn(1, tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)
        found, expected = linear(inputs_1TI, converted, bias), linear(inputs_1TI, weight, bias)
        errors.append(relative_error(found, expected=expected))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def best_backend(ratios: Mapping[str, Mapping[int, float]]) -> str:
    """The backend whose worst speedup is the best; the first among equals.

    Args:
        ratios: backend -> T -> speedup; not empty.
    """
    return max(ratios, key=lambda backend: min(ratios[backend].values()))


def is_faster(ratios: Mapping[int, float], *, margin: float) -> bool:
    """Whether a layer gains more than the margin at every T: one that is faster at some and slower at others does not.

    Args:
        ratios: T -> speedup.
        margin: share of the time that has to be gained beyond the noise of measuring; 0.05 asks for 1.05.
    """
    return all(ratio > 1 + margin for ratio in ratios.values())
