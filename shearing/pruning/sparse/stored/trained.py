"""A sparse model before and after training: whether its masks fit it, and a manifest that is true again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shearing.errors import ShearingError
from shearing.files.durable import write_json
from shearing.files.tensors import read_header, read_tensors
from shearing.models.stored.expert_files import whole_masks
from shearing.models.stored.headers import shapes_in_files
from shearing.models.stored.paging.places import weight_in
from shearing.pruning.sparse.patterns import KeptOf, pattern_of
from shearing.pruning.sparse.stored.manifest import MANIFEST, file_entries, reached_budget, read_manifest
from shearing.pruning.sparse.stored.masks import (
    FILE_NAME as MASKS,
    mask_shapes,
    masks_file,
    pack,
    read_masks,
    write_masks,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def masks_beside(folder: Path) -> Path | None:
    """The masks that are stored with a model; None where it has none.

    Raises:
        ShearingError: masks without a manifest, or a manifest without masks.
    """
    masks = masks_file(folder)
    found = [path.name for path in (folder / MANIFEST, masks) if path.is_file()]
    if len(found) == 1:
        absent = MASKS if found == [MANIFEST] else MANIFEST
        raise ShearingError(
            "source",
            value=f"{folder} with {found[0]} and without {absent}",
            allowed="a sparse model with both, or a model with neither, whose zeros are weights like all others",
            mend=f"put {absent} back, or remove {found[0]} to let every weight be trained",
        )
    return masks if found else None


def groups_of(folder: Path) -> dict[str, KeptOf]:
    """N and M of every matrix of a sparse model, by name of the weight: what masks may move in.

    Raises:
        ShearingError: the model is not sparse, or some of it not N:M.
    """
    if masks_beside(folder) is None:
        raise ShearingError(
            "ast",
            value="a section",
            allowed=f"for a sparse model, and {folder} is a dense one",
            mend="make it sparse first, with a pattern as 2:4, or leave masks alone",
        )
    groups: dict[str, KeptOf] = {}
    for name, about in read_manifest(folder)["matrices"].items():
        pattern = pattern_of(about["pattern"])
        if not isinstance(pattern, KeptOf):
            raise ShearingError(
                "ast",
                value=f"{name} has the pattern {pattern}",
                allowed="matrices of N:M: masks move inside groups",
                mend="make it sparse with a pattern as 2:4, or leave masks alone",
            )
        groups[name] = pattern
    return groups


def require_masks_fit(masks: Path, *, model: PreTrainedModel) -> None:
    """Check that every mask is of a parameter of the model as files have it; the model may be a skeleton.

    Raises:
        ShearingError: one is not.
    """
    shapes = shapes_in_files(model)
    for name, shape in mask_shapes(masks).items():
        if shapes.get(name) != shape:
            raise _not_of_this_model(
                masks,
                found=f"a mask of {list(shape)} for {name}",
                allowed=f"shape {list(shapes[name])}" if name in shapes else "masks of the model's own parameters",
            )


@torch.no_grad()
def require_zeros(masks: Path, *, model: PreTrainedModel) -> None:
    """Check that what the masks drop is 0 in the model.

    Raises:
        ShearingError: the masks are of another model, or the model was changed after they were stored.
    """
    require_masks_fit(masks, model=model)
    for name, mask in whole_masks(model, read_masks(masks)):
        weight = weight_in(model, name)
        if wrong := int((weight.ne(0) & ~mask.to(weight.device)).sum()):
            raise _not_of_this_model(
                masks, found=f"{wrong} weights of {name} that the mask drops are not 0", allowed="0 wherever it drops"
            )


def write_trained(
    target: Path,
    *,
    source: Path,
    record: Mapping[str, Any] | None,
    moved: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
) -> None:
    """Put masks and manifest of a sparse model beside the same model after training, or in another dtype.

    Args:
        target: folder of the trained model, with its weights.
        source: folder of the sparse model that training began with.
        record: JSON-able; what the manifest says of this training, after those before it; None: there was none, the
            model was only written anew.
        moved: name of a weight and its bool mask, of all masked weights one after the other, where training has chosen
            masks anew; None: they are those of the source.
    """
    manifest = read_manifest(source)
    if moved is None:
        shutil.copyfile(masks_file(source), target / MASKS)
    else:
        _write_moved(target / MASKS, moved, manifest=manifest)
    weights = sorted(path.name for path in target.glob("*.safetensors"))
    files = {tensor: name for name in weights for tensor in read_header(target / name)[0]}
    for name, about in manifest["matrices"].items():
        about["nonzero"] = int(read_tensors(target / files[name], [name])[name].count_nonzero())
    if record is not None:
        manifest["trained"] = [*manifest.get("trained", []), dict(record)]
    manifest["files"] = file_entries(target, names=[*weights, MASKS])
    write_json(target / MANIFEST, manifest)


def _write_moved(path: Path, moved: Callable[[], Iterable[tuple[str, Tensor]]], *, manifest: dict[str, Any]) -> None:
    """Write masks, and count them in a manifest, in place."""
    described = manifest["matrices"]
    write_masks(
        path,
        shapes={name: tuple(about["shape"]) for name, about in described.items()},
        packed=((name, pack(mask)) for name, mask in _counted(moved(), described=described)),
    )
    reached = reached_budget(described.values())
    whole = manifest["budget"]["of_all_parameters"]
    whole["sparsity"] = (reached["of"] - reached["kept"]) / whole["parameters"]
    manifest["budget"]["reached"] = reached
    layers: dict[str, list[Mapping[str, Any]]] = {layer: [] for layer in manifest["layers"]}
    for name, about in described.items():
        layers[next(part for part in name.split(".") if part.isdigit())].append(about)
    manifest["layers"] = {layer: reached_budget(members) for layer, members in layers.items()}


def _counted(
    masks: Iterable[tuple[str, Tensor]], *, described: Mapping[str, dict[str, Any]]
) -> Iterator[tuple[str, Tensor]]:
    for name, mask in masks:
        described[name]["kept"] = int(mask.sum())
        yield name, mask


def _not_of_this_model(masks: Path, *, found: str, allowed: str) -> ShearingError:
    return ShearingError(
        str(masks),
        value=found,
        allowed=f"the masks that were stored with this very model: {allowed}",
        mend="put the model's own masks there, or sparsify it again",
    )
