"""Fingerprints of tensors, the same however those are cut up: what is restored is compared with what was saved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from shearing.errors import ShearingError, key

Fingerprints = dict[str, int]
"""`KIND/PARAMETER` -> fingerprint."""

_CHUNK = 1 << 22
_MODULUS = 1 << 64
_NEGATIVE_ZERO = -(1 << 31)


def fingerprint(values: Tensor, *, start: int) -> int:
    """Sum of each element's bits times an odd number that its position gives, modulo 2^64.

    Those of all pieces of a tensor add up to that of the whole, in whatever pieces it is cut.

    Args:
        values: fp32 [n], elements `start` to `start + n - 1` of a flattened tensor.
        start: position of the first.
    """
    total = 0
    bits = values.detach().contiguous().view(torch.int32)
    for first in range(0, bits.numel(), _CHUNK):
        chunk = bits[first : first + _CHUNK].to(torch.int64)
        # A sum over processes may turn -0.0 into 0.0; nothing that is trained can tell them apart.
        chunk = torch.where(chunk == _NEGATIVE_ZERO, torch.zeros_like(chunk), chunk)
        position = torch.arange(start + first, start + first + chunk.numel(), device=chunk.device)
        total += int((chunk * (2 * position + 1)).sum())
    return total % _MODULUS


def add_fingerprints(parts: Iterable[Fingerprints]) -> Fingerprints:
    """Fingerprints of whole tensors from those of their pieces."""
    total: Fingerprints = {}
    for part in parts:
        for tensor, value in part.items():
            total[tensor] = (total.get(tensor, 0) + value) % _MODULUS
    return total


def require_same(found: Fingerprints, *, saved: Fingerprints, folder: Path) -> None:
    """Refuse to train on anything but what was saved.

    Raises:
        ShearingError: a weight or moment that differs.
    """
    different = sorted(tensor for tensor in found.keys() | saved.keys() if found.get(tensor) != saved.get(tensor))
    if different:
        raise ShearingError(
            str(folder),
            value=f"{len(different)} of {len(saved)} tensors came back different, the first {different[0]}",
            allowed="weights and moments as they were saved, bit for bit",
            mend=f"this is a defect of the engine, not of the checkpoint: continue with {key('engine')}=torch, "
            "and report it with the versions you use",
        )
