"""Reads a GGUF file into numpy arrays: the header, and the three tensor types the demo's model has.

The reference reader builds an object per header value, 98,000 of them for a vocabulary; walking the bytes instead
reads the demo's model in a second. Layouts: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BLOCK_WEIGHTS = 32


@dataclass(frozen=True)
class TensorType:
    """How a tensor's bytes are laid out: blocks of `weights` numbers in `bytes` bytes."""

    weights: int
    bytes: int
    dequantize: Callable[[npt.NDArray[np.uint8]], FloatArray]


def _float32(blocks: npt.NDArray[np.uint8]) -> FloatArray:
    return blocks.view("<f4")


def _q4_1(blocks: npt.NDArray[np.uint8]) -> FloatArray:
    """Weight = scale * q + minimum; low nibbles are the first half of a block, high nibbles the second."""
    scale = blocks[:, 0:2].view("<f2").astype(np.float32)
    minimum = blocks[:, 2:4].view("<f2").astype(np.float32)
    quants = np.concatenate([blocks[:, 4:] & 0x0F, blocks[:, 4:] >> 4], axis=1)
    return scale * quants.astype(np.float32) + minimum


def _q8_0(blocks: npt.NDArray[np.uint8]) -> FloatArray:
    """Weight = scale * q."""
    return blocks[:, 0:2].view("<f2").astype(np.float32) * blocks[:, 2:].view(np.int8).astype(np.float32)


TENSOR_TYPES = {
    0: TensorType(1, 4, _float32),
    3: TensorType(BLOCK_WEIGHTS, 20, _q4_1),
    8: TensorType(BLOCK_WEIGHTS, 34, _q8_0),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in the file: its layout, blocks [num_blocks, bytes] and shape, slowest dimension first."""

    layout: TensorType
    blocks: npt.NDArray[np.uint8]
    shape: tuple[int, ...]

    def dequantize(self) -> FloatArray:
        return self.layout.dequantize(self.blocks).reshape(self.shape)


@dataclass(frozen=True)
class Gguf:
    """Header values by key, and stored tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(content: bytes) -> Gguf:
    """Parse a whole file; tensors stay as they are until asked for.

    Raises:
        ValueError: not a little-endian GGUF file of version 2 or 3, or a tensor type other than F32, Q4_1, Q8_0.
    """
    magic, version, num_tensors, num_values = struct.unpack_from("<4sIQQ", content, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"not a GGUF file of version 2 or 3: {magic!r} {version}")
    offset = struct.calcsize("<4sIQQ")
    metadata = {}
    for _ in range(num_values):
        key, offset = _string(content, offset)
        (kind,) = struct.unpack_from("<I", content, offset)
        metadata[key], offset = _value(content, offset + 4, kind)
    headers = []
    for _ in range(num_tensors):
        name, offset = _string(content, offset)
        (num_dimensions,) = struct.unpack_from("<I", content, offset)
        *dimensions, kind, start = struct.unpack_from(f"<{num_dimensions}QIQ", content, offset + 4)
        offset += 4 + 8 * num_dimensions + 12
        headers.append((name, dimensions[::-1], kind, start))
    alignment = metadata.get("general.alignment", 32)
    data = math.ceil(offset / alignment) * alignment
    tensors = {}
    for name, shape, kind, start in headers:
        if kind not in TENSOR_TYPES:
            raise ValueError(f"tensor {name} has type {kind}; known: F32 (0), Q4_1 (3), Q8_0 (8)")
        layout = TENSOR_TYPES[kind]
        count = math.prod(shape) // layout.weights * layout.bytes
        raw = np.frombuffer(content, dtype=np.uint8, count=count, offset=data + start)
        tensors[name] = StoredTensor(layout, raw.reshape(-1, layout.bytes), tuple(shape))
    return Gguf(metadata, tensors)


def _string(content: bytes, offset: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", content, offset)
    end = offset + 8 + length
    return content[offset + 8 : end].decode(), end


def _value(content: bytes, offset: int, kind: int) -> tuple[Any, int]:
    if kind == STRING:
        return _string(content, offset)
    if kind == ARRAY:
        item_kind, length = struct.unpack_from("<IQ", content, offset)
        offset += 12
        items = []
        for _ in range(length):
            item, offset = _value(content, offset, item_kind)
            items.append(item)
        return items, offset
    code = f"<{SCALARS[kind]}"
    return struct.unpack_from(code, content, offset)[0], offset + struct.calcsize(code)
