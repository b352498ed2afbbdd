"""Masks on disk: which weights are kept, one bit each, so that later training can enforce them.

masks.packed holds, under the name of each pruned weight, a uint8 tensor: the mask row by row, eight weights in a byte,
the first in its highest bit (`numpy.packbits`), 1 where kept. Shapes are in its metadata. The file has the format
of safetensors and another suffix, because servers take every `*.safetensors` in a model's folder for weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shearing.errors import ShearingError
from shearing.files.tensors import read_header, read_tensors, write_in_turn

FILE_NAME = "masks.packed"
EARLIER_NAME = "masks.safetensors"
FORMAT = "shearing masks 1"


def masks_file(folder: Path) -> Path:
    """Where the masks beside a model are, or would be; those of earlier versions have another name."""
    earlier = folder / EARLIER_NAME
    return earlier if earlier.is_file() and not (folder / FILE_NAME).is_file() else folder / FILE_NAME


def pack(mask: Tensor) -> Tensor:
    """A bool mask of any shape as bits: uint8 [⌈elements / 8⌉]."""
    return torch.from_numpy(np.packbits(mask.cpu().flatten().numpy()))


def unpack(bits: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    """The bool mask that `pack` was given."""
    count = torch.Size(shape).numel()
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).view(np.bool_)).view(shape)


def write_masks(path: Path, *, shapes: Mapping[str, tuple[int, ...]], packed: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file of masks, holding one at a time.

    Args:
        path: file to write.
        shapes: of the masks, by name of the weight.
        packed: each mask once, packed.
    """
    metadata = {"format": FORMAT, "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()})}
    sizes = {name: (torch.Size(shape).numel() + 7) // 8 for name, shape in shapes.items()}
    like = {name: torch.empty(size, dtype=torch.uint8, device="meta") for name, size in sizes.items()}
    write_in_turn(path, like, tensors=packed, metadata=metadata)


def mask_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the masks in a file by name of the weight.

    Raises:
        ShearingError: no file of masks.
    """
    entries, metadata = read_header(path)
    try:
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']}")
        shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
        if shapes.keys() != entries.keys():
            raise ValueError("names and shapes differ")
    except (KeyError, ValueError) as error:
        raise ShearingError(
            str(path), value=str(error), allowed=f"a file in the format {FORMAT!r}", mend="sparsify the model again"
        ) from error
    return shapes


def read_masks(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Masks by name of the weight, bool and true where kept, one at a time.

    Raises:
        ShearingError: no file of masks.
    """
    for name, shape in mask_shapes(path).items():
        yield name, unpack(read_tensors(path, [name])[name], shape=shape)
