"""Safetensors files as bytes on disk: what is where, reading a few tensors, writing without holding all of them.

The format: the header's length (8 bytes, little-endian), the header (JSON), the tensors one after the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WRITE_AGAIN = (
    "fetch or write it again; of a run's compact/, remove that folder, and the command that needed it makes it again"
)
"""What to do about a damaged file."""

_METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype as the format says it, its shape, and where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


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
            str(path), value=str(error), allowed="a whole safetensors file", mend=WRITE_AGAIN
        ) from error
    return entries, metadata


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a file by name, on the CPU; the file is not kept open, so that its pages can leave memory."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def read_range(path: Path, entry: Entry, *, start: int = 0, numel: int | None = None) -> Tensor:
    """Elements [numel] of one flattened tensor of a file, on the CPU, as they are stored; all from `start` on if None.

    Read, and not mapped: no more of the file is in this process's memory than what is returned.

    Args:
        path: the file.
        entry: of the tensor, from the file's header.
        start: position of the first.
        numel: how many.
    """
    count = entry.numel - start if numel is None else numel
    assert 0 <= start <= start + count <= entry.numel, (path, start, count)
    values = torch.empty(count, dtype=DTYPES[entry.dtype])
    with path.open("rb", buffering=0) as file:
        file.seek(entry.begin + start * values.itemsize)
        wanted = memoryview(_bytes(values))
        while wanted:  # a system call reads 2 GB at the most
            read = file.readinto(wanted)
            if not read:
                raise ShearingError(
                    str(path), value="its end is missing", allowed="a whole safetensors file", mend="fetch it again"
                )
            wanted = wanted[read:]
    return values


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file by name, on the CPU; each is read when it is asked for, and not kept.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries, _ = read_header(path)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        return read_range(self._path, entry).view(entry.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


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
    path: Path, like: Mapping[str, Tensor], *, tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str]
) -> None:
    """Write a file of which only one tensor has to exist at a time; see `opened_in_turn`.

    Args:
        path: file to write.
        like: tensors of the dtypes and shapes of those in the file; their values are not read.
        tensors: each once, in any order.
        metadata: text for the header.
    """
    with opened_in_turn(path, like, metadata=metadata) as write:
        for name, tensor in tensors:
            write(name, tensor)


@contextlib.contextmanager
def opened_in_turn(
    path: Path, like: Mapping[str, Tensor], *, metadata: dict[str, str]
) -> Iterator[Callable[[str, Tensor], None]]:
    """A file that tensors are put into one after the other; the same file, byte for byte, that `save_file` writes.

    It is written beside its place, flushed to disk, and renamed once it has all of its tensors.

    Args:
        path: file to write; its folder exists.
        like: tensors of the dtypes and shapes of those in the file; their values are not read.
        metadata: text for the header.

    Returns:
        What puts a tensor on the CPU into the file, by its name.

    Raises:
        OSError: the file cannot be written; `full_disk.is_disk_full` tells why. Nothing is left of it.
    """
    header: dict[str, Any] = {_METADATA: metadata} if metadata else {}
    begins: dict[str, int] = {}
    offset = 0
    for name in sorted(like, key=lambda name: (-like[name].itemsize, name)):
        size = like[name].numel() * like[name].itemsize
        header[name] = {
            "dtype": _NAMES[like[name].dtype],
            "shape": list(like[name].shape),
            "data_offsets": [offset, offset + size],
        }
        begins[name] = offset
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    beside = path.with_name(f".{path.name}.writing")
    beside.unlink(missing_ok=True)
    try:
        with beside.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)

            def write(name: str, tensor: Tensor) -> None:
                wanted = like[name]
                assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), name
                file.seek(8 + len(text) + begins.pop(name))
                file.write(_bytes(tensor))

            yield write
            assert not begins, f"never written: {sorted(begins)[:5]}"
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    beside.replace(path)
    flush_folder(path.parent)


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
