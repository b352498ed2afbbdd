"""The weights and moments that an engine holds: how they come to be there, are written and are read back.

Which pieces of them a process holds is the engine's own business; all else is the same for every engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shearing.errors import ShearingError, key
from shearing.models.stored.paging.places import Place
from shearing.processes.processes import Processes
from shearing.training.checkpoints.fingerprints import Fingerprints, add_fingerprints, require_same
from shearing.training.checkpoints.pieces import (
    MOMENTS,
    SET_ASIDE,
    STEP,
    WEIGHT,
    Piece,
    SavedState,
    ShardedState,
    StagedPieces,
    fingerprints,
    require_parameters,
)
from shearing.training.engines.optimizer import set_steps

Shapes = Mapping[str, tuple[int, ...]]
"""Parameter -> shape, of all parameters of the model."""


@torch.no_grad()
def materialise(
    tensors: Iterable[Tensor],
    *,
    device: torch.device,
    processes: Processes,
    places: Mapping[Tensor, Place] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Put weights or buffers on the device: from their files, or the main process's on all processes.

    Args:
        tensors: filled in place; on other processes than the main one they may be placeholders.
        device: where they are to be.
        processes: all of which call this.
        places: what of them is stored, and where; each process reads it.
        dtype: of what is read; None: that of the tensor.

    Raises:
        ShearingError: see `Place.read`.
    """
    in_memory: list[Tensor] = []
    stored: list[tuple[Tensor, Place]] = []
    for tensor in tensors:
        place = None if places is None else places.get(tensor)
        if place is None:
            in_memory.append(tensor)
        else:
            stored.append((tensor, place))
    if stored:
        processes.each(lambda: _read(stored, device=device, dtype=dtype))
    for tensor in in_memory:
        if processes.is_main:
            tensor.data = tensor.data.to(device)
        elif tensor.device != device or not tensor.is_contiguous():
            tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if processes.size > 1:
            dist.broadcast(tensor.data, src=0)


def _read(stored: Iterable[tuple[Tensor, Place]], *, device: torch.device, dtype: torch.dtype | None) -> None:
    for tensor, place in stored:
        tensor.data = place.read(device=device, dtype=dtype or tensor.dtype).view(tensor.shape)


@torch.no_grad()
def fill_from_files(pieces: Iterable[Piece], places: Mapping[str, Place], *, processes: Processes) -> None:
    """Fill the weights that this process holds from the files of the model.

    Args:
        pieces: of parameters of any kind.
        places: parameter -> where it is stored; others stay as they are.
        processes: all of which call this.

    Raises:
        ShearingError: see `Place.read`.
    """

    def fill_own() -> None:
        for piece in pieces:
            if (place := places.get(piece.name)) is not None:
                weight = piece.values[WEIGHT]
                weight.copy_(place.read(start=piece.start, numel=piece.numel, device=weight.device, dtype=weight.dtype))

    processes.each(fill_own)


def whole_pieces(
    parameters: Mapping[str, nn.Parameter], *, optimizer: torch.optim.Optimizer, among: Processes | None
) -> Iterator[Piece]:
    """Every parameter, where each process holds all of all of them.

    Args:
        parameters: by name.
        optimizer: AdamW, with the moments of those that are trained.
        among: of each parameter this process's equal share alone, so that together they have it once; None: all of it.
    """
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        whole = {WEIGHT: parameter.detach(), **{kind: state[kind] for kind in MOMENTS if kind in state}}
        numel = parameter.numel()
        share = numel if among is None else -(-numel // among.size)
        start = 0 if among is None else min(among.rank * share, numel)
        yield Piece(
            name=name,
            shape=tuple(parameter.shape),
            start=start,
            values={kind: value.view(-1)[start : start + share] for kind, value in whole.items()},
        )


class StagedShard(StagedPieces):
    """The file that this process writes of a checkpoint.

    Args:
        pieces, optimizer, processes: of the engine; all of AdamW's state has one step count.
        copied: see `StagedPieces`.
    """

    def __init__(
        self, pieces: Iterable[Piece], *, optimizer: torch.optim.Optimizer, processes: Processes, copied: bool
    ) -> None:
        counts = {float(state[STEP]) for state in optimizer.state.values()}
        if len(counts) > 1:
            raise RuntimeError(f"AdamW counts different steps for different parameters: {sorted(counts)}")
        super().__init__(pieces, step=counts.pop() if counts else 0.0, copied=copied)
        self._name = f"shard-{processes.rank:05d}-of-{processes.size:05d}.safetensors"

    def write_into(self, folder: Path) -> Fingerprints:
        """See `StagedPieces.write`."""
        return self.write(folder / self._name)


def load_pieces(folder: Path, pieces: Iterable[Piece], *, optimizer: torch.optim.Optimizer, shapes: Shapes) -> None:
    """Fill what this process holds from a checkpoint, and AdamW's step count.

    Raises:
        ShearingError: it is another model's.
    """
    state = ShardedState(folder)
    require_parameters(state, shapes=shapes, folder=folder)
    fill(pieces, state, kinds=(WEIGHT, *MOMENTS, SET_ASIDE))
    set_steps(optimizer, state.step)


def require_loaded(folder: Path, pieces: Iterable[Piece], *, saved: Fingerprints, processes: Processes) -> None:
    """Compare what all processes hold with what was saved.

    Args:
        folder: the checkpoint, for people.
        pieces: those of this process; over all processes every element occurs once.
        saved: fingerprints of what was saved.
        processes: those that hold it.

    Raises:
        ShearingError: a weight or moment that differs.
    """
    require_same(add_fingerprints(processes.gather(fingerprints(pieces))), saved=saved, folder=folder)


def fill_moments(
    pieces: Iterable[Piece], moments: SavedState, *, optimizer: torch.optim.Optimizer, shapes: Shapes
) -> None:
    """Start from AdamW state instead of from nothing.

    Raises:
        ShearingError: it is not of these parameters.
    """
    for name, shape in moments.shapes.items():
        if shapes.get(name) != shape:
            raise ShearingError(
                f"optimiser state of {name}",
                value=shape,
                allowed="state of the model's own parameters"
                + (f"; this one has shape {shapes[name]}" if name in shapes else ""),
                mend=f"set {key('optimizer')}=fresh, or learn the masks again in a new {key('folder')}",
            )
    fill(pieces, moments, kinds=MOMENTS)
    set_steps(optimizer, moments.step)


@torch.no_grad()
def fill(pieces: Iterable[Piece], state: SavedState, *, kinds: Iterable[str]) -> None:
    """Copy what a state holds of each piece into the engine's memory; moments that it lacks become zero."""
    for piece in pieces:
        for kind in kinds:
            if kind not in piece.values:
                continue
            if kind in state.kinds:
                # A copy into the optimiser's own memory: what a file's buffer is aligned to can change rounding.
                piece.values[kind].copy_(state.read(kind, piece.name, start=piece.start, numel=piece.numel))
            else:
                piece.values[kind].zero_()
