"""The sparse model on disk: the source's own files with zeros in them, masks as bits, and a manifest of what was done.

OUTPUT/config.json, tokenizer…     as in the source; config.json in the spellings of transformers 4 and 5
OUTPUT/*.safetensors               as in the source, byte for byte but for the pruned matrices
OUTPUT/masks.packed                see `masks`
OUTPUT/sparsity.json               the manifest
OUTPUT/allocation.json             the level of every matrix, and why; allocation.png where levels differ
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from shearing.files.durable import flush_folder, flush_tree, read_json, write_json
from shearing.files.tensors import overwrite
from shearing.models.shape import Shape
from shearing.models.stored.spellings import in_both_spellings
from shearing.models.stored.stored_model import Source
from shearing.pruning.calibration.places import Matrix
from shearing.pruning.sparse.allocation.file import FILE_NAME as ALLOCATION, StoredAllocation
from shearing.pruning.sparse.allocation.picture import FILE_NAME as PICTURE, draw_allocation
from shearing.pruning.sparse.stored.manifest import FORMAT, MANIFEST, file_entries, reached_budget
from shearing.pruning.sparse.stored.masks import FILE_NAME as MASKS, write_masks
from shearing.pruning.sparse.stored.pruned_layers import PrunedLayers

CONVENTION = "N:M means N kept of each M consecutive inputs"


@dataclass(frozen=True)
class Done:
    """What a manifest says about how a model was made.

    Attributes:
        settings: JSON-able; what two runs have to have in common to give the same model.
        method: JSON-able; criterion, reconstruction, allocation, pattern.
        calibration: JSON-able; None where no text was read.
        versions: of what computed it.
        budget: share of the weights kept that was asked for.
    """

    settings: Mapping[str, Any]
    method: Mapping[str, Any]
    calibration: Mapping[str, Any] | None
    versions: Mapping[str, Any]
    budget: Fraction


def write_output(
    output: Path,
    *,
    beside: Path,
    source: Source,
    matrices: Sequence[Matrix],
    pruned_layers: PrunedLayers,
    done: Done,
    allocation: StoredAllocation,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the sparse model; the folder appears as a whole or not at all. One layer is in memory at a time.

    Args:
        output: folder to make.
        beside: folder on the same disk in which it is made.
        source: the dense model.
        matrices: those that were pruned.
        pruned_layers: what was found for every layer.
        done: how.
        allocation: the level of every matrix.
        advance: called with the number of bytes copied or read.

    Returns:
        The manifest.
    """
    copy_files(source, beside, advance=advance)
    layers = sorted({matrix.layer for matrix in matrices})
    for layer in layers:
        weights = pruned_layers.weights(layer)
        for file in sorted({source.files[name] for name in weights}):
            overwrite(beside / file, {name: weight for name, weight in weights.items() if source.files[name] == file})
    shapes = {matrix.name: (matrix.rows, matrix.columns) for matrix in matrices}
    write_masks(beside / MASKS, shapes=shapes, packed=_packed(pruned_layers, layers))
    manifest = _manifest(source, matrices=matrices, facts=[pruned_layers.facts(layer) for layer in layers], done=done)
    manifest["files"] = file_entries(beside, names=[*source.weight_files(), MASKS], advance=advance)
    write_json(beside / ALLOCATION, dict(allocation.content))
    if len(set(allocation.patterns.values())) > 1:
        draw_allocation(allocation, path=beside / PICTURE)
    write_json(beside / MANIFEST, manifest)
    flush_tree(beside)
    beside.rename(output)
    flush_folder(output.parent)
    return manifest


def copy_files(source: Source, beside: Path, *, advance: Callable[[int], None] = lambda _: None) -> None:
    """Copy the model's own files into a new folder.

    Args:
        source: the model.
        beside: made, in place of what an interrupted run has left there.
        advance: called with the number of bytes of each file with tensors.
    """
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for name in source.other_files():
        if name == "config.json":
            _copy_config(source.folder / name, beside / name)
        else:
            (beside / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / name, beside / name)
    for name in source.weight_files():
        shutil.copyfile(source.folder / name, beside / name)
        advance((beside / name).stat().st_size)


def _copy_config(path: Path, copy: Path) -> None:
    """Byte for byte, unless the source's lacks what a reader of another version looks for."""
    content = read_json(path)
    complete = in_both_spellings(content)
    if complete == content:
        shutil.copyfile(path, copy)
    else:
        write_json(copy, complete)


def _packed(pruned_layers: PrunedLayers, layers: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    for layer in layers:
        yield from pruned_layers.packed_masks(layer).items()


def _manifest(
    source: Source, *, matrices: Sequence[Matrix], facts: Sequence[Mapping[str, Any]], done: Done
) -> dict[str, Any]:
    of_matrices = {name: about for of_layer in facts for name, about in of_layer["matrices"].items()}
    layers: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        layers.setdefault(str(matrix.layer), []).append(matrix)
    reached = reached_budget(of_matrices.values())
    if source.structure is None:
        total = Shape.of(source.config).num_parameters()
    else:
        total = sum(math.prod(entry.shape) for entry in source.entries.values())
    return {
        "format": FORMAT,
        "convention": CONVENTION,
        **done.method,
        "budget": {
            "asked": {"kept": str(done.budget), "sparsity": float(1 - done.budget)},
            "reached": reached,
            "of_all_parameters": {"parameters": total, "sparsity": (reached["of"] - reached["kept"]) / total},
        },
        "calibration": done.calibration,
        "layers": {
            layer: reached_budget([of_matrices[matrix.name] for matrix in members]) for layer, members in layers.items()
        },
        "matrices": {matrix.name: of_matrices[matrix.name] for matrix in matrices},
        "settings": dict(done.settings),
        "versions": dict(done.versions),
        "seconds": {
            kind: round(sum(of_layer["seconds"][kind] for of_layer in facts), 4) for kind in ("forward", "metric")
        },
    }
