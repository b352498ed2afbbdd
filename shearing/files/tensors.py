"""Safetensors files as bytes on disk: what is where, reading a few tensors, writing without holding all of them.

The format: the header's length (8 bytes, little-endian), the header (JSON), the tensors one after the other.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shearing.errors import ShearingError
from shearing.files.durable import flush_folder

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype as the format says it, its shape, and where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file and its metadata.

    Raises:
        ShearingError: no whole safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(min(length, path.stat().st_size)))
        metadata = header.pop(_METADATA, {})
        offset = 8 + length
        entries = {
            name: Entry(of["dtype"], tuple(of["shape"]), *(offset + place for place in of["data_offsets"]))
            for name, of in header.items()
        }
        missing = max((entry.end for entry in entries.values()), default=0) - path.stat().st_size
        if missing > 0:
            raise ValueError(f"{missing} bytes are missing at its end")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ShearingError(
            str(path), value=str(error), allowed="a whole safetensors file", mend="fetch or write it again"
        ) from error
    return entries, metadata


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a file by name, on the CPU; the file is not kept open, so that its pages can leave memory."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, exact to the bit, beside its place and renamed into it.

    Args:
        path: file to write; its folder exists.
        tensors: no two may share memory.
        metadata: text for the file's header.

    Raises:
        OSError, SafetensorError: the file cannot be written; `full_disk.is_disk_full` tells why. Nothing is left of it.
    """
    beside = path.with_name(f".{path.name}.writing")
    beside.unlink(missing_ok=True)
    beside.touch()
    mode = beside.stat().st_mode  # by the umask; safetensors puts a file in its place that is for the owner alone
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata=metadata)
        beside.chmod(mode)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    beside.replace(path)
    flush_folder(path.parent)


def overwrite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put other values into tensors of a file, whose dtypes and shapes stay."""
    entries, _ = read_header(path)
    with path.open("r+b") as file:
        for name, tensor in tensors.items():
            entry = entries[name]
            assert (DTYPES[entry.dtype], entry.shape) == (tensor.dtype, tuple(tensor.shape)), name
            file.seek(entry.begin)
            file.write(_bytes(tensor))


def write_in_turn(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: dict[str, str],
) -> None:
    """Write a file of uint8 tensors, of which only one has to exist at a time.

    Args:
        path: file to write, flushed to disk.
        shapes: of every tensor, in the order of the file.
        tensors: each once, in any order.
        metadata: text for the header.
    """
    header: dict[str, Any] = {_METADATA: metadata}
    begins: dict[str, int] = {}
    offset = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        header[name] = {"dtype": "U8", "shape": list(shape), "data_offsets": [offset, offset + size]}
        begins[name] = offset
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
        for name, tensor in tensors:
            assert (tensor.dtype, tuple(tensor.shape)) == (torch.uint8, shapes[name]), name
            file.seek(8 + len(text) + begins[name])
            file.write(_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
