"""Every matrix at every level, computed once from dense statistics: a candidate then costs one forward pass.

Where kept weights stay as they are, a byte for each weight says at which of eight levels it is kept; levels need not be
nested. Where they change (`obs`), every level's weights are on disk. Legend: O outputs, I inputs, V levels.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearing.errors import ShearingError
from shearing.files.durable import existing_folder
from shearing.files.tensors import read_tensors, write_tensors
from shearing.progress import activity
from shearing.pruning.calibration.dense_layers import DenseLayer, dense_layers, dense_units
from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.sparse.allocation.allocator import Request
from shearing.pruning.sparse.criteria.criterion import Criterion
from shearing.pruning.sparse.patterns import Pattern
from shearing.pruning.sparse.reconstruction.reconstruction import Choice, keep, prune_matrix

LEVELS_PER_PLANE = 8
MOST_ELEMENTS = 1 << 28
"""Weights that are pruned together, copies for several levels counted."""


@dataclass(frozen=True)
class Stacked(Pattern):
    """Several patterns at once, each for its own part of the rows: O rows for each of V patterns, in order.

    Where rows do not see each other, as in Optimal Brain Surgeon, all levels of a matrix are pruned together.
    """

    levels: tuple[Pattern, ...]

    @property
    def density(self) -> Fraction:
        return sum((level.density for level in self.levels), Fraction(0)) / len(self.levels)

    @property
    def in_words(self) -> str:
        return "; ".join(level.in_words for level in self.levels)

    @property
    def whole_rows(self) -> bool:
        return any(level.whole_rows for level in self.levels)

    @property
    def columns_at_once(self) -> int | None:
        at_once = {level.columns_at_once for level in self.levels}
        assert len(at_once) == 1
        return at_once.pop()

    def keep(self, scores: Tensor, *, first: int = 0) -> Tensor:
        parts = scores.chunk(len(self.levels))
        return torch.cat([level.keep(part, first=first) for level, part in zip(self.levels, parts, strict=True)])

    def holds(self, mask: Tensor) -> bool:
        parts = mask.chunk(len(self.levels))
        return all(level.holds(part) for level, part in zip(self.levels, parts, strict=True))


@dataclass(frozen=True)
class Apart:
    """A criterion over several copies of a matrix, one below the other, each scored as if it were alone.

    Attributes:
        criterion: which.
        copies: how many.
    """

    criterion: Criterion
    copies: int

    @property
    def name(self) -> str:
        """See `Criterion`."""
        return self.criterion.name

    @property
    def needs(self) -> frozenset[Need]:
        """See `Criterion`."""
        return self.criterion.needs

    @property
    def follows_compensation(self) -> bool:
        """See `Criterion`."""
        return self.criterion.follows_compensation

    def scores(
        self, weight: Tensor, *, statistics: InputStatistics | None, first: int = 0, in_order: bool = False
    ) -> Tensor:
        """See `Criterion`."""
        of_part = partial(self.criterion.scores, statistics=statistics, first=first, in_order=in_order)
        return torch.cat([of_part(part) for part in weight.chunk(self.copies)])


class Database:
    """Weights of matrices at levels; made by `build_database`.

    Args:
        folder: of its files, one for each layer.
        request: what they were made for.
    """

    def __init__(self, folder: Path, request: Request) -> None:
        self._folder = folder
        self._levels = list(request.levels)
        self._changes = bool(request.reconstruction.needs)
        self._device, self._dtype = request.compute.device, request.compute.dtype
        self._layers = {matrix.name: matrix.layer for matrix in request.matrices}
        self._planes: dict[str, list[Tensor]] = {}
        self._dense: dict[str, Tensor] = {}
        if not self._changes:
            for layer in sorted(set(self._layers.values())):
                names = [name for name, of in self._layers.items() if of == layer]
                self._dense |= request.source.read(names)
                stored = read_tensors(
                    _path(folder, layer), [_key(n, p) for n in names for p in range(self._num_planes)]
                )
                for name in names:
                    self._planes[name] = [stored[_key(name, plane)] for plane in range(self._num_planes)]

    @property
    def _num_planes(self) -> int:
        return -(-len(self._levels) // LEVELS_PER_PLANE)

    def put(self, weight: Tensor, *, name: str, level: int) -> None:
        """Make a parameter what the matrix is at a level.

        Args:
            weight: [O, I] in the compute dtype, on the device; changed in place.
            name: of the matrix.
            level: its index.
        """
        if self._changes:
            path = _path(self._folder, self._layers[name])
            weight.copy_(read_tensors(path, [_key(name, level)])[_key(name, level)])
            return
        plane, bit = divmod(level, LEVELS_PER_PLANE)
        kept = self._planes[name][plane].to(weight.device).bitwise_and(1 << bit).ne_(0)
        weight.copy_(self._dense[name])
        weight.mul_(kept)


def build_database(request: Request, *, folder: Path) -> Database:
    """Compute what is not there yet; a layer's file is whole or absent, so that an interrupted call can be repeated.

    Args:
        request: model, matrices, text, criterion, reconstruction and levels.
        folder: for the files, made if absent.

    Raises:
        ShearingError: the disk is too small, or the model computes NaN or infinity.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = sorted({matrix.layer for matrix in request.matrices})
    if not all(_path(folder, layer).is_file() for layer in layers):
        require_room(request, folder=folder)
        needs = request.criterion.needs | request.reconstruction.needs
        total = dense_units(
            request.matrices, needs=needs, calibration=request.calibration, compute=request.compute
        ) + len(layers)
        with activity("every matrix at every level", total=total, console=request.console) as advance:
            walk = dense_layers(
                request.source,
                matrices=request.matrices,
                needs=needs,
                damping=request.damping,
                calibration=request.calibration,
                compute=request.compute,
                advance=advance,
            )
            for layer in walk:
                if not _path(folder, layer.layer).is_file():
                    write_tensors(_path(folder, layer.layer), _tensors(layer, request=request), metadata={})
                del layer
                advance(1)
    return Database(folder, request)


def database_bytes(*, levels: int, weights: int, stored_bytes: int, changes: bool) -> int:
    """What `build_database` writes.

    Args:
        levels: V.
        weights: of all matrices.
        stored_bytes: of these, in their own dtype.
        changes: whether kept weights change; else bits say which are kept.
    """
    return levels * stored_bytes if changes else -(-levels // LEVELS_PER_PLANE) * weights


def require_room(request: Request, *, folder: Path) -> None:
    """Check that what `build_database` has still to write fits onto the disk.

    Args:
        request, folder: see `build_database`; the folder need not be there.

    Raises:
        ShearingError: it does not.
    """
    missing = [matrix for matrix in request.matrices if not _path(folder, matrix.layer).is_file()]
    needed = database_bytes(
        levels=len(request.levels),
        weights=sum(matrix.size for matrix in missing),
        stored_bytes=request.source.bytes_of(matrix.name for matrix in missing),
        changes=bool(request.reconstruction.needs),
    )
    free = shutil.disk_usage(existing_folder(folder)).free
    if free < needed:
        raise ShearingError(
            "levels",
            value=f"{len(request.levels)} levels, which take {needed / 1e9:.1f} GB in {folder}",
            allowed=f"what fits into the {free / 1e9:.1f} GB that are free there",
            mend="search with fewer levels, choose an output on another disk, or reconstruction: none",
        )


@torch.no_grad()
def _tensors(layer: DenseLayer, *, request: Request) -> dict[str, Tensor]:
    of_matrix = _levels_of if request.reconstruction.needs else _planes_of
    tensors: dict[str, Tensor] = {}
    for name, weight in layer.weights.items():
        statistics = layer.statistics[name]
        found = of_matrix(weight.to(request.compute.device), statistics=statistics, request=request)
        tensors |= {_key(name, index): tensor.cpu() for index, tensor in found.items()}
    return tensors


def _planes_of(weight: Tensor, *, statistics: InputStatistics | None, request: Request) -> dict[int, Tensor]:
    """Planes uint8 [O, I] by number: bit k of plane p is set where level 8 p + k keeps the weight."""
    scores = request.criterion.scores(weight, statistics=statistics)
    gone = weight == 0
    planes: dict[int, Tensor] = {}
    for index, level in enumerate(request.levels):
        plane, bit = divmod(index, LEVELS_PER_PLANE)
        empty = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
        planes.setdefault(plane, empty).add_(keep(scores, pattern=level, gone=gone).to(torch.uint8) << bit)
    return planes


def _levels_of(weight: Tensor, *, statistics: InputStatistics | None, request: Request) -> dict[int, Tensor]:
    """Weights [O, I] in their own dtype by index of the level."""
    together: dict[Any, list[int]] = {}
    for index, level in enumerate(request.levels):
        alike = (level.columns_at_once, level.whole_rows) if request.reconstruction.rows_apart else index
        together.setdefault(alike, []).append(index)
    found: dict[int, Tensor] = {}
    at_once = max(1, MOST_ELEMENTS // weight.numel())
    for indices in (alike[i : i + at_once] for alike in together.values() for i in range(0, len(alike), at_once)):
        pattern = Stacked(tuple(request.levels[index] for index in indices))
        choice = Choice(Apart(request.criterion, len(indices)), pattern, statistics)
        pruned, _ = prune_matrix(weight.repeat(len(indices), 1), reconstruction=request.reconstruction, choice=choice)
        found |= dict(zip(indices, pruned.to(weight.dtype).chunk(len(indices)), strict=True))
    return {index: tensor.clone() for index, tensor in found.items()}


def _path(folder: Path, layer: int) -> Path:
    return folder / f"{layer:05d}.safetensors"


def _key(name: str, index: int) -> str:
    return f"{name}/{index}"
