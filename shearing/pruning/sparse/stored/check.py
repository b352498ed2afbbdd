"""Does a sparse model hold what its manifest and its masks say? Every difference is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from shearing.errors import ShearingError
from shearing.files.tensors import read_header, read_tensors
from shearing.pruning.sparse.patterns import pattern_of
from shearing.pruning.sparse.stored.manifest import MANIFEST, file_entries, reached_budget, read_manifest
from shearing.pruning.sparse.stored.masks import mask_shapes, masks_file, read_masks


def bytes_to_check(folder: Path) -> int:
    """What `differences` will advance by in total; raises as `read_manifest` does."""
    return sum(int(entry["bytes"]) for entry in read_manifest(folder)["files"].values())


def differences(folder: Path, *, advance: Callable[[int], None] = lambda _: None) -> list[str]:
    """Compare a model with its manifest and its masks; one matrix is in memory at a time.

    Files are compared by size and SHA-256, masks with the pattern and the counts of each matrix, weights with their
    mask, budgets with what the matrices add up to.

    Args:
        folder: of the sparse model.
        advance: called with the number of bytes just read.

    Returns:
        One sentence for each difference; empty where there is none.

    Raises:
        ShearingError: there is no manifest to compare with.
    """
    manifest = read_manifest(folder)
    return [
        *_files(folder, manifest, advance=advance),
        *_budgets(manifest),
        *_matrices(folder, manifest),
    ]


def _files(folder: Path, manifest: dict[str, Any], *, advance: Callable[[int], None]) -> Iterator[str]:
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            yield f"{name}: missing"
            continue
        found = file_entries(folder, names=[name], advance=advance)[name]
        if found["bytes"] != expected["bytes"]:
            yield f"{name}: {found['bytes']} bytes, the manifest says {expected['bytes']}"
        elif found["sha256"] != expected["sha256"]:
            yield f"{name}: its SHA-256 is not the manifest's"


def _budgets(manifest: dict[str, Any]) -> Iterator[str]:
    matrices = manifest["matrices"]
    if reached_budget(matrices.values()) != manifest["budget"]["reached"]:
        yield f"{MANIFEST}: the matrices do not add up to budget.reached"
    kept = sum(of_layer["kept"] for of_layer in manifest["layers"].values())
    if kept != manifest["budget"]["reached"]["kept"]:
        yield f"{MANIFEST}: the layers do not add up to budget.reached"


def _matrices(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    described: dict[str, Any] = manifest["matrices"]
    masks = masks_file(folder)
    files: dict[str, str] = {}
    try:
        for name in manifest["files"]:
            if name != masks.name and (folder / name).is_file():
                files |= dict.fromkeys(read_header(folder / name)[0], name)
        shapes = mask_shapes(masks)
    except ShearingError as error:
        yield f"{error.field}: {error.value}"
        return
    yield from (f"{name}: no mask" for name in described if name not in shapes)
    yield from (f"{name}: a mask, but the manifest does not know it" for name in shapes if name not in described)
    for name, mask in read_masks(masks):
        if name not in described:
            continue
        weight = read_tensors(folder / files[name], [name])[name] if name in files else None
        yield from (f"{name}: {difference}" for difference in _matrix(described[name], mask=mask, weight=weight))


def _matrix(about: dict[str, Any], *, mask: Tensor, weight: Tensor | None) -> Iterator[str]:
    if list(mask.shape) != about["shape"]:
        yield f"its mask is {list(mask.shape)}, the manifest says {about['shape']}"
        return
    if not pattern_of(about["pattern"]).holds(mask):
        yield f"its mask is not {about['pattern']}"
    if (kept := int(mask.sum())) != about["kept"]:
        yield f"its mask keeps {kept:,} weights, the manifest says {about['kept']:,}"
    if weight is None:
        yield "the model has no such weight"
    elif list(weight.shape) != about["shape"]:
        yield f"its shape is {list(weight.shape)}, the manifest says {about['shape']}"
    elif wrong := int((weight.ne(0) & ~mask).sum()):
        yield f"{wrong:,} weights that the mask removes are not zero"
    elif (nonzero := int(weight.count_nonzero())) != about["nonzero"]:
        yield f"{nonzero:,} weights are not zero, the manifest says {about['nonzero']:,}"
