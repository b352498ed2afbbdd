"""The dense model layer by layer: weights and what the text says of their inputs, nothing pruned on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shearing.models.stored.stored_model import Source
from shearing.pruning.calibration.gradients import read_gradients
from shearing.pruning.calibration.places import Matrix, Place, places_in
from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.calibration.stored_walk import Compute, LayerWalk, chunks_of
from shearing.pruning.calibration.text import Calibration


@dataclass(frozen=True)
class DenseLayer:
    """What is chosen of a decoder layer.

    Attributes:
        layer: its index.
        weights: by name of the matrix, [O, I] on the CPU as they are stored.
        statistics: by name of the matrix, on the compute device; those that read the same input share one object. None
            where nothing is needed.
    """

    layer: int
    weights: dict[str, Tensor]
    statistics: dict[str, InputStatistics | None]


def dense_units(
    matrices: Sequence[Matrix], *, needs: frozenset[Need], calibration: Calibration | None, compute: Compute
) -> int:
    """How often `dense_layers` calls `advance` with 1."""
    layers = {matrix.layer for matrix in matrices}
    if calibration is None or not needs:
        return len(layers)
    return (max(layers) + 1) * len(chunks_of(calibration, compute=compute))


@torch.no_grad()
def dense_layers(
    source: Source,
    *,
    matrices: Sequence[Matrix],
    needs: frozenset[Need],
    damping: float,
    calibration: Calibration | None,
    compute: Compute,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[DenseLayer]:
    """The layers that have some of the matrices, first to last, each passed through once; one in memory at a time.

    Let go of a layer (`del`, in a loop) before asking for the next, or there are two.

    Args:
        source: the model.
        matrices: at least one.
        needs: statistics of their inputs; none: no text is read. Gradients have to lie in the folder of `compute`.
        damping: see `damped_factors`.
        calibration: the text; may be None where nothing is needed.
        compute: where and how.
        advance: for progress, see `dense_units`.

    Raises:
        ShearingError: the model computes NaN or infinity.
    """
    of_layer: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        of_layer.setdefault(matrix.layer, []).append(matrix)
    if not needs:
        for layer in sorted(of_layer):
            names = [matrix.name for matrix in of_layer[layer]]
            yield DenseLayer(layer, source.read(names), dict.fromkeys(names))
            advance(1)
        return
    assert calibration is not None
    walk = LayerWalk(source, calibration=calibration, compute=compute, advance=advance)
    places = places_in(source)
    last = max(of_layer)
    for layer in range(last + 1):
        module, stored = walk.load(layer)
        place_of = _place_of(layer, places, names={matrix.name for matrix in of_layer.get(layer, [])}, walk=walk)
        if not place_of:
            walk.propagate(layer, module)
            walk.let_go(module)
            continue
        wanted = [place for place in places if place in place_of.values()]
        found = walk.statistics(layer, module, wanted, needs=needs, damping=damping, propagate=layer < last)
        walk.let_go(module)
        statistics = {name: found[place.name] for name, place in place_of.items()}
        if "gradients" in needs:
            length = calibration.tokens.shape[1]
            statistics = {
                name: of_place.with_gradients(read_gradients(name, layer=layer, folder=compute.folder), length=length)
                for name, of_place in statistics.items()
            }
        yield DenseLayer(layer, {name: stored[name] for name in place_of}, {**statistics})
        del stored, found, statistics


def _place_of(layer: int, places: Sequence[Place], *, names: set[str], walk: LayerWalk) -> dict[str, Place]:
    """The place of each of the named matrices of a layer."""
    by_name = {walk.name(layer, f"{member}.weight"): place for place in places for member in place.members}
    return {name: place for name, place in by_name.items() if name in names}
