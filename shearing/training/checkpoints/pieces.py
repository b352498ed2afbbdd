"""Weights and AdamW moments on disk, in pieces that any number of processes can write and any other can read.

Every process writes the pieces of the flattened parameters that it holds, and reads back whatever ranges it holds
then: no process ever needs a whole tensor, and nothing is gathered. What is restored is compared with what was saved by
fingerprints that do not depend on how a tensor is cut, so an engine that puts a piece in the wrong place is found out.

Why not DeepSpeed's universal checkpoint: with several parameter groups it restores group 0's hyperparameters and step
count to all of them (docs/distributed.md).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shearing.errors import ShearingError, key
from shearing.files.tensors import Entry, read_header, read_range, write_in_turn
from shearing.training.checkpoints.fingerprints import Fingerprints, add_fingerprints, fingerprint, require_same

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
SET_ASIDE = "set_aside"
"""What a weight is while a moving mask drops it; NaN where it is kept. Only of parameters whose masks move."""

_SAVED = "saved"  # one entry of a file's header, as the order of several is not always the same


@dataclass(frozen=True)
class Piece:
    """Elements `start … start + n - 1` of one flattened parameter, as an engine holds them.

    Attributes:
        name: of the parameter.
        shape: of the whole parameter.
        start: position of the first element.
        values: kind (`weight`, `exp_avg`, `exp_avg_sq`, `set_aside`) -> view [n] of the engine's own memory, fp32.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Mapping[str, Tensor]

    @property
    def numel(self) -> int:
        """Number of elements (n)."""
        return self.values[WEIGHT].numel()


class SavedState(Protocol):
    """Weights or moments by range, from wherever they are kept."""

    @property
    def step(self) -> float:
        """AdamW's step count."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Parameter -> shape."""
        ...

    @property
    def kinds(self) -> frozenset[str]:
        """What there is of each parameter."""
        ...

    def read(self, kind: str, name: str, *, start: int, numel: int) -> Tensor:
        """Elements [numel] of one flattened parameter, on the CPU."""
        ...


class StagedPieces:
    """The pieces that a process holds, to be written: copies in host memory while training goes on, or they themselves.

    Args:
        pieces: what this process writes; over all processes every element occurs once.
        step: AdamW's step count, the same for all parameters.
        copied: whether they may change before they are written; else one tensor is copied at a time.
    """

    def __init__(self, pieces: Iterable[Piece], *, step: float, copied: bool = True) -> None:
        self._pieces = (
            list(pieces)
            if not copied
            else [
                replace(
                    piece, values={kind: value.detach().to("cpu", copy=True) for kind, value in piece.values.items()}
                )
                for piece in pieces
            ]
        )
        self._step = step

    def write(self, path: Path) -> Fingerprints:
        """Write them to one safetensors file, and read back what is there now.

        Returns:
            Their fingerprints.

        Raises:
            ShearingError: the file does not hold what was written.
        """
        tensors = {
            f"{kind}/{piece.name}@{piece.start}": value.detach()
            for piece in self._pieces
            for kind, value in piece.values.items()
        }
        shapes = {piece.name: piece.shape for piece in self._pieces}
        write_in_turn(
            path,
            tensors,
            # Copies: what numpy has looked at cannot be given back to the system by its engine.
            tensors=((name, tensor.to("cpu", copy=True)) for name, tensor in tensors.items()),
            metadata={_SAVED: json.dumps({STEP: float(self._step), "shapes": shapes})},
        )
        meant = fingerprints(self._pieces)
        entries, _ = read_header(path)
        read = (
            replace(
                piece,
                values={kind: read_range(path, entries[f"{kind}/{piece.name}@{piece.start}"]) for kind in piece.values},
            )
            for piece in self._pieces
        )
        require_same(fingerprints(read), saved=meant, folder=path)
        return meant


def fingerprints(pieces: Iterable[Piece]) -> Fingerprints:
    """Of every kind of every parameter among these pieces; those of all processes' pieces add up."""
    return add_fingerprints(
        {f"{kind}/{piece.name}": fingerprint(value, start=piece.start) for kind, value in piece.values.items()}
        for piece in pieces
    )


class ShardedState:
    """What `StagedPieces` wrote into the files `shard-*.safetensors` of a folder.

    Raises:
        ShearingError: the files do not belong together.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pieces: dict[str, list[tuple[int, Path, Entry]]] = defaultdict(list)
        self.shapes: dict[str, tuple[int, ...]] = {}
        steps = set()
        for path in sorted(folder.glob("shard-*.safetensors")):
            entries, metadata = read_header(path)
            saved = json.loads(metadata[_SAVED])
            steps.add(saved[STEP])
            self.shapes |= {name: tuple(shape) for name, shape in saved["shapes"].items()}
            for piece, entry in entries.items():
                whole, _, start = piece.rpartition("@")
                self._pieces[whole].append((int(start), path, entry))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])
        if len(steps) != 1:
            raise ShearingError(
                str(folder),
                value=f"shards of the steps {sorted(steps)}",
                allowed="shards of one step",
                mend="remove this checkpoint; the one before it is used",
            )
        self.step = steps.pop()
        self.kinds = frozenset(whole.partition("/")[0] for whole in self._pieces)

    def read(self, kind: str, name: str, *, start: int, numel: int) -> Tensor:
        """See `SavedState.read`.

        Raises:
            ShearingError: elements are missing.
        """
        found: list[Tensor] = []
        position, end = start, start + numel
        for first, path, entry in self._pieces.get(f"{kind}/{name}", []):
            stop = min(end, first + entry.numel)
            if first <= position < stop:
                found.append(read_range(path, entry, start=position - first, numel=stop - position))
                position = stop
        if position < end:
            raise ShearingError(
                str(self._folder),
                value=f"elements {position} to {end} of {kind}/{name} are in no shard",
                allowed="all shards of the checkpoint",
                mend="remove this checkpoint; the one before it is used",
            )
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def whole(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and its whole tensor of one kind, on the CPU; not every one has a `SET_ASIDE`."""
        for name, shape in self.shapes.items():
            if kind == SET_ASIDE and f"{kind}/{name}" not in self._pieces:
                continue
            numel = int(torch.Size(shape).numel())
            yield name, self.read(kind, name, start=0, numel=numel).view(shape)

    def weights(self, *, prefix: str = "") -> Mapping[str, Tensor]:
        """Weights by name; each is read when it is asked for.

        Args:
            prefix: left out at the beginning of names.
        """
        return _Wholes(self, WEIGHT, names={name.removeprefix(prefix): name for name in self.shapes})

    def moments(self, *, prefix: str = "") -> dict[str, Mapping[str, Tensor]]:
        """AdamW's state by kind and parameter, with its step count for each; a tensor is read when it is asked for.

        Args:
            prefix: left out at the beginning of names.
        """
        kinds = [kind for kind in MOMENTS if kind in self.kinds]
        names = [name.removeprefix(prefix) for name in self.shapes]
        return {
            **{kind: _Wholes(self, kind, names={each: prefix + each for each in names}) for kind in kinds},
            STEP: {name: torch.tensor(self.step) for name in names},
        }


class _Wholes(Mapping[str, Tensor]):
    """Whole tensors of one kind by name, each read when it is asked for.

    Args:
        state: where they are read from.
        kind: of each parameter.
        names: as they are asked for -> as the state calls them.
    """

    def __init__(self, state: SavedState, kind: str, *, names: Mapping[str, str]) -> None:
        self._state, self._kind, self._names = state, kind, names

    def __getitem__(self, name: str) -> Tensor:
        whole = self._names[name]
        shape = self._state.shapes[whole]
        return self._state.read(self._kind, whole, start=0, numel=int(torch.Size(shape).numel())).view(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def require_parameters(state: SavedState, *, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Check that a saved state is of these parameters.

    Raises:
        ShearingError: another model's.
    """
    saved = dict(state.shapes)
    different = sorted(name for name in saved | dict(shapes) if saved.get(name) != shapes.get(name))
    if different:
        raise ShearingError(
            str(folder),
            value=f"{len(different)} parameters that differ from the model's, the first {different[0]}: "
            f"{saved.get(different[0])} instead of {shapes.get(different[0])}",
            allowed="a checkpoint of this model",
            mend=f"use another {key('folder')}, or go back to the model this run was started with",
        )


class SavedMoments:
    """AdamW state that `write_moments` wrote, as a `SavedState`: a process reads what it holds, never the whole.

    Args:
        path: the file.
        prefix: what names of parameters begin with, beyond those in the file.
    """

    def __init__(self, path: Path, *, prefix: str = "") -> None:
        self._path, self._prefix = path, prefix
        self._entries, _ = read_header(path)
        self.kinds = frozenset(MOMENTS)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.step = 0.0
        for tensor, entry in self._entries.items():
            kind, name = tensor.split("/", 1)
            if kind == MOMENTS[0]:
                self.shapes[prefix + name] = entry.shape
            elif kind == STEP:
                self.step = max(self.step, float(read_range(path, entry)))

    def read(self, kind: str, name: str, *, start: int, numel: int) -> Tensor:
        """See `SavedState.read`."""
        entry = self._entries[f"{kind}/{name.removeprefix(self._prefix)}"]
        return read_range(self._path, entry, start=start, numel=numel)


def write_moments(
    path: Path, moments: Iterable[tuple[str, str, Tensor]], *, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Write AdamW state to one file with keys `KIND/PARAMETER`; only one tensor has to exist at a time.

    Args:
        path: file to write.
        moments: kind, parameter and tensor, in any order: moments and the step count of all parameters.
        shapes: of the parameters.
    """
    like = {f"{kind}/{name}": torch.empty(shape, device="meta") for kind in MOMENTS for name, shape in shapes.items()}
    like |= {f"{STEP}/{name}": torch.empty((), device="meta") for name in shapes}
    write_in_turn(path, like, tensors=((f"{kind}/{name}", value) for kind, name, value in moments), metadata={})
