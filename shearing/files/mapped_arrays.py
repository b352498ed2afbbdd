"""Files as read-only arrays that keep no file descriptor, so that thousands of domains can be open at once.

`numpy.memmap` rests on Python's `mmap`, which holds a descriptor for as long as the array lives.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_FAILED = ctypes.c_void_p(-1).value
_C = ctypes.CDLL(None, use_errno=True)
_C.mmap.restype = ctypes.c_void_p
_C.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_C.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_C.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_file(path: Path, *, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The whole file as an array, memory-mapped; a rest of less than one element is left out.

    Returns:
        Read-only [elements]; the mapping goes with the last view of it.

    Raises:
        OSError: the file cannot be opened or mapped.
    """
    kind = np.dtype(dtype)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size // kind.itemsize * kind.itemsize
        if size == 0:
            return np.empty(0, dtype=kind)
        address = _C.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), "cannot be memory-mapped", str(path))
    memory = (ctypes.c_char * size).from_address(address)
    weakref.finalize(memory, _C.munmap, address, size)
    array: npt.NDArray[Any] = np.frombuffer(memoryview(memory), dtype=kind)
    array.flags.writeable = False
    return array


def map_array(path: Path) -> npt.NDArray[Any]:
    """The array of a `.npy` file, memory-mapped and read-only.

    Raises:
        OSError: the file cannot be opened or mapped.
        ValueError: it is no `.npy` file, or shorter than its header says.
    """
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
        start = file.tell()
    content = map_file(path, dtype=np.uint8)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(content) != start + size or fortran_order or dtype.hasobject:
        raise ValueError(f"{len(content)} bytes, but its header announces {start + size}")
    return content[start:].view(dtype).reshape(shape)


class ReadAhead:
    """Asks for parts of a mapped array to be read in the background.

    Rows are read from anywhere, and the kernel's guess, which reads on from where it was, is wrong each time: asked for
    together, 32 rows came 40 times as fast from a disk as one after the other, and more threads brought nothing.

    Args:
        array: as `map_file` returns it.
    """

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._address = array.ctypes.data
        self._size = array.itemsize
        self._length = len(array)

    def __call__(self, start: int, stop: int) -> None:
        """Ask for elements [start, stop), cut off at the end of the array."""
        first = self._address + start * self._size
        first -= first % mmap.PAGESIZE
        last = self._address + min(stop, self._length) * self._size
        if first < last:
            _C.madvise(first, last - first, mmap.MADV_WILLNEED)
