"""What was found for each decoder layer, on disk as soon as it is known: what an interrupted run continues from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from shearing.files.tensors import read_header, read_tensors, write_tensors
from shearing.pruning.sparse.stored.masks import pack

_WEIGHT, _MASK = "weight/", "mask/"


@dataclass(frozen=True)
class PrunedMatrix:
    """A pruned matrix.

    Attributes:
        weight: [O, I] in the dtype of the source, on the CPU.
        mask: [O, I] bool, true where kept.
        facts: JSON-able, for the manifest.
    """

    weight: Tensor
    mask: Tensor
    facts: dict[str, Any]


class PrunedLayers:
    """One file for each decoder layer, whole or absent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in folder.glob(".*"):
            left_by_a_kill.unlink()

    def __contains__(self, layer: int) -> bool:
        return self._path(layer).is_file()

    def save(self, layer: int, matrices: Mapping[str, PrunedMatrix], *, facts: Mapping[str, Any]) -> None:
        """Write what was found for a layer; matrices by name of the weight, `facts` about the layer as a whole."""
        tensors = {_WEIGHT + name: matrix.weight for name, matrix in matrices.items()}
        tensors |= {_MASK + name: pack(matrix.mask) for name, matrix in matrices.items()}
        about = {**facts, "matrices": {name: matrix.facts for name, matrix in matrices.items()}}
        write_tensors(self._path(layer), tensors, metadata={"facts": json.dumps(about)})

    def facts(self, layer: int) -> dict[str, Any]:
        """What `save` was given about a layer, and about each of its matrices under `matrices`."""
        _, metadata = read_header(self._path(layer))
        facts: dict[str, Any] = json.loads(metadata["facts"])
        return facts

    def weights(self, layer: int) -> dict[str, Tensor]:
        """Pruned weights of a layer by name."""
        return self._read(layer, _WEIGHT)

    def packed_masks(self, layer: int) -> dict[str, Tensor]:
        """Packed masks of a layer by name of the weight."""
        return self._read(layer, _MASK)

    def _read(self, layer: int, kind: str) -> dict[str, Tensor]:
        entries, _ = read_header(self._path(layer))
        names = [name for name in entries if name.startswith(kind)]
        return {name.removeprefix(kind): tensor for name, tensor in read_tensors(self._path(layer), names).items()}

    def _path(self, layer: int) -> Path:
        return self._folder / f"{layer:05d}.safetensors"
