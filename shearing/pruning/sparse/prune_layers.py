"""Pruning layer by layer: each layer's statistics come from the layers before it as they are once pruned.

Only one layer's weights and a few sequences are on the compute device at a time. Where no statistics are needed, no
text is propagated.

Legend: B sequences of a chunk, S positions, d hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from shearing.models.stored.stored_model import Source
from shearing.pruning.calibration.gradients import read_gradients
from shearing.pruning.calibration.places import Place, matrices_of, num_blocks, num_layers, places_in, weight_of
from shearing.pruning.calibration.statistics import InputStatistics
from shearing.pruning.calibration.stored_walk import Compute, LayerWalk, chunks_of, not_finite
from shearing.pruning.calibration.text import Calibration
from shearing.pruning.sparse.criteria.criterion import Criterion
from shearing.pruning.sparse.patterns import Pattern
from shearing.pruning.sparse.reconstruction.reconstruction import Choice, Reconstruction, prune_matrix
from shearing.pruning.sparse.stored.pruned_layers import PrunedLayers, PrunedMatrix


@dataclass(frozen=True)
class Method:
    """How every matrix is pruned.

    Attributes:
        criterion, reconstruction: two of the three choices.
        allocation: the third: pattern by name of each matrix to prune; others stay dense.
        damping: see `InverseFactor`.
        true_sequential: inside a layer, what reads the attention's output sees query, key and value already pruned,
            and so on; else all matrices of a layer see the dense layer's inputs.
    """

    criterion: Criterion
    reconstruction: Reconstruction
    allocation: Mapping[str, Pattern]
    damping: float
    true_sequential: bool

    @property
    def needs_text(self) -> bool:
        """Whether statistics of inputs are needed."""
        return bool(self.criterion.needs | self.reconstruction.needs)


def units_of_work(source: Source, *, method: Method, calibration: Calibration | None, compute: Compute) -> int:
    """How often `prune_layers` calls `advance`, had it nothing to continue from."""
    if calibration is None or not method.needs_text:
        return num_blocks(source)
    passes = len(_groups(places_in(source), method=method)) + 1
    return num_layers(source) * passes * len(chunks_of(calibration, compute=compute))


@torch.no_grad()
def prune_layers(
    source: Source,
    *,
    method: Method,
    calibration: Calibration | None,
    compute: Compute,
    pruned_layers: PrunedLayers,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Prune all layers that `pruned_layers` does not hold yet, and write them there.

    A criterion's gradients have to lie in the folder of `compute` (`gather_gradients`).

    Layers that are there already are only computed, as their second pass was, so that a run that was interrupted ends
    in the same bits as one that was not.

    Raises:
        ShearingError: the model computes NaN or infinity, or its inputs' second moment cannot be inverted.
    """
    with_text = calibration is not None and method.needs_text
    if source.structure is not None and not with_text:
        _prune_blocks(source, method=method, compute=compute, pruned_layers=pruned_layers, advance=advance)
        return
    pruning = _Pruning(source, method=method, calibration=calibration, compute=compute, advance=advance)
    last = num_layers(source) - 1
    for layer in range(last + 1):
        if layer in pruned_layers:
            pruning.skip(layer, pruned_layers.weights(layer), propagate=layer < last)
        else:
            matrices, seconds = pruning.prune(layer, propagate=layer < last)
            pruned_layers.save(layer, matrices, facts={"seconds": seconds})


def _prune_blocks(
    source: Source,
    *,
    method: Method,
    compute: Compute,
    pruned_layers: PrunedLayers,
    advance: Callable[[int], None],
) -> None:
    """Prune matrices where they lie: no layer is computed, so it need not be known how."""
    blocks: dict[int, list[str]] = {block: [] for block in range(num_blocks(source))}
    for matrix in matrices_of(source):
        if matrix.name in method.allocation:
            blocks[matrix.layer].append(matrix.name)
    for block, names in blocks.items():
        if block not in pruned_layers:
            dense, started = source.read(names), time.perf_counter()
            pruned = {
                name: _prune_matrix(name, weight, method=method, device=compute.device, statistics=None)
                for name, weight in dense.items()
            }
            seconds = {"forward": 0.0, "metric": time.perf_counter() - started}
            pruned_layers.save(block, pruned, facts={"seconds": seconds})
        advance(1)


def _prune_matrix(
    name: str, weight: Tensor, *, method: Method, device: torch.device, statistics: InputStatistics | None
) -> PrunedMatrix:
    pattern = method.allocation[name]
    choice = Choice(method.criterion, pattern, statistics)
    new, mask = prune_matrix(weight.to(device), reconstruction=method.reconstruction, choice=choice)
    new, mask = new.to(weight.dtype).cpu(), mask.cpu()
    if not bool(new.isfinite().all()):
        raise not_finite(f"the reconstruction of {name}")
    facts = {
        "pattern": str(pattern),
        "shape": list(weight.shape),
        "zero_before": weight.numel() - int(weight.count_nonzero()),
        "kept": int(mask.sum()),
        "nonzero": int(new.count_nonzero()),
    }
    if statistics is not None and statistics.damping is not None:
        facts["damping"] = statistics.damping
    return PrunedMatrix(new, mask, facts)


class _Pruning:
    def __init__(
        self,
        source: Source,
        *,
        method: Method,
        calibration: Calibration | None,
        compute: Compute,
        advance: Callable[[int], None],
    ) -> None:
        self._method, self._compute, self._advance = method, compute, advance
        self._length = 0 if calibration is None else calibration.tokens.shape[1]
        self._groups = _groups(places_in(source), method=method)
        self._with_text = calibration is not None and method.needs_text
        self._walk = LayerWalk(
            source, calibration=calibration if self._with_text else None, compute=compute, advance=advance
        )

    def prune(self, layer: int, *, propagate: bool) -> tuple[dict[str, PrunedMatrix], dict[str, float]]:
        """Pruned matrices of a layer by name, and the seconds that passes and pruning took."""
        module, dense = self._walk.load(layer)
        pruned: dict[str, PrunedMatrix] = {}
        seconds = {"forward": 0.0, "metric": 0.0}
        for group in self._groups:
            started = self._now()
            statistics = self._statistics(layer, module, group) if self._with_text else {}
            passed = self._now()
            for place in group:
                # Popped: a second moment may be larger than the layer, and is let go of with its place.
                of_place = self._prune_place(layer, module, place, dense, statistics=statistics.pop(place.name, None))
                pruned.update(of_place)
            seconds["forward"] += passed - started
            seconds["metric"] += self._now() - passed
        started = self._now()
        self._propagate(layer, module, needed=propagate)
        seconds["forward"] += self._now() - started
        self._walk.let_go(module)
        return pruned, seconds

    def skip(self, layer: int, weights: Mapping[str, Tensor], *, propagate: bool) -> None:
        """Computes a layer that is pruned already."""
        if not self._with_text:
            self._advance(1)
            return
        for _ in self._groups:
            self._walk.pass_by()
        module, _ = self._walk.load(layer, instead=weights)
        self._propagate(layer, module, needed=propagate)
        self._walk.let_go(module)

    def _prune_place(
        self,
        layer: int,
        module: nn.Module,
        place: Place,
        dense: Mapping[str, Tensor],
        *,
        statistics: InputStatistics | None,
    ) -> dict[str, PrunedMatrix]:
        pruned = {}
        for member in place.members:
            name = self._walk.name(layer, f"{member}.weight")
            if name in self._method.allocation:
                if statistics is not None and "gradients" in self._method.criterion.needs:
                    gradients = read_gradients(name, layer=layer, folder=self._compute.folder)
                    statistics = statistics.with_gradients(gradients, length=self._length)
                pruned[name] = _prune_matrix(
                    name, dense[name], method=self._method, device=self._compute.device, statistics=statistics
                )
                weight_of(module, member).copy_(pruned[name].weight)
        return pruned

    def _statistics(self, layer: int, module: nn.Module, group: Sequence[Place]) -> dict[str, InputStatistics]:
        wanted = [
            place
            for place in group
            if any(self._walk.name(layer, f"{member}.weight") in self._method.allocation for member in place.members)
        ]
        if not wanted:
            self._walk.pass_by()
            return {}
        needs = self._method.criterion.needs | self._method.reconstruction.needs
        return self._walk.statistics(layer, module, wanted, needs=needs, damping=self._method.damping, propagate=False)

    def _propagate(self, layer: int, module: nn.Module, *, needed: bool) -> None:
        """After the last layer nobody reads the streams."""
        if not self._with_text:
            self._advance(1)
        elif needed:
            self._walk.propagate(layer, module)
        else:
            self._walk.pass_by()

    def _now(self) -> float:
        if self._compute.device.type == "cuda":
            torch.cuda.synchronize(self._compute.device)
        return time.perf_counter()


def _groups(places: Sequence[Place], *, method: Method) -> list[list[Place]]:
    """Places whose inputs are read in one pass, and whose matrices are pruned after it."""
    if not method.true_sequential:
        return [list(places)]
    return [list(group) for _, group in groupby(places, key=lambda place: place.side_by_side)]
