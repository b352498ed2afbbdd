"""A sparse model before and after training: whether its masks fit it, and a manifest that is true again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shearing.errors import ShearingError
from shearing.files.durable import write_json
from shearing.files.tensors import read_header, read_tensors
from shearing.models.stored.places import weight_in
from shearing.pruning.sparse.stored.manifest import MANIFEST, file_entries, read_manifest
from shearing.pruning.sparse.stored.masks import FILE_NAME as MASKS, mask_shapes, masks_file, read_masks


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


def require_masks_fit(masks: Path, *, model: nn.Module) -> None:
    """Check that every mask is of a parameter of the model, which may be a skeleton.

    Raises:
        ShearingError: one is not.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, shape in mask_shapes(masks).items():
        if shapes.get(name) != shape:
            raise _not_of_this_model(
                masks,
                found=f"a mask of {list(shape)} for {name}",
                allowed=f"shape {list(shapes[name])}" if name in shapes else "masks of the model's own parameters",
            )


@torch.no_grad()
def require_zeros(masks: Path, *, model: nn.Module) -> None:
    """Check that what the masks drop is 0 in the model.

    Raises:
        ShearingError: the masks are of another model, or the model was changed after they were stored.
    """
    require_masks_fit(masks, model=model)
    for name, mask in read_masks(masks):
        weight = weight_in(model, name)
        if wrong := int((weight.ne(0) & ~mask.to(weight.device)).sum()):
            raise _not_of_this_model(
                masks, found=f"{wrong} weights of {name} that the mask drops are not 0", allowed="0 wherever it drops"
            )


def write_trained(target: Path, *, source: Path, record: Mapping[str, Any] | None) -> None:
    """Put masks and manifest of a sparse model beside the same model after training, or in another dtype.

    Args:
        target: folder of the trained model, with its weights.
        source: folder of the sparse model that training began with.
        record: JSON-able; what the manifest says of this training, after those before it; None: there was none, the
            model was only written anew.
    """
    shutil.copyfile(masks_file(source), target / MASKS)
    manifest = read_manifest(source)
    weights = sorted(path.name for path in target.glob("*.safetensors"))
    files = {tensor: name for name in weights for tensor in read_header(target / name)[0]}
    for name, about in manifest["matrices"].items():
        about["nonzero"] = int(read_tensors(target / files[name], [name])[name].count_nonzero())
    if record is not None:
        manifest["trained"] = [*manifest.get("trained", []), dict(record)]
    manifest["files"] = file_entries(target, names=[*weights, MASKS])
    write_json(target / MANIFEST, manifest)


def _not_of_this_model(masks: Path, *, found: str, allowed: str) -> ShearingError:
    return ShearingError(
        str(masks),
        value=found,
        allowed=f"the masks that were stored with this very model: {allowed}",
        mend="put the model's own masks there, or sparsify it again",
    )
