"""Fingerprints against a sum in whole numbers, of tensors of several chunks."""

from __future__ import annotations

import struct

import pytest
import torch

from shearing.training.checkpoints import fingerprints
from shearing.training.checkpoints.fingerprints import fingerprint


def _oracle(values: list[float]) -> int:
    """Of a whole tensor, as `fingerprint` defines it; -0.0 is 0.0."""
    bits = struct.unpack(f"<{len(values)}i", struct.pack(f"<{len(values)}f", *(value or 0.0 for value in values)))
    total: int = sum(of_one * (2 * position + 1) for position, of_one in enumerate(bits))
    return total % 2**64


def test_pieces_of_any_cut_add_up_also_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_CHUNK", 5)
    values = torch.randn(23, generator=torch.Generator().manual_seed(0))
    values[11] = -0.0
    whole = fingerprint(values, start=0)
    assert whole == _oracle(values.tolist())
    for cut in range(24):
        parts = fingerprint(values[:cut], start=0) + fingerprint(values[cut:], start=cut)
        assert parts % 2**64 == whole, cut


def test_elements_at_the_same_place_of_two_chunks_may_not_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_CHUNK", 5)
    values = torch.randn(23, generator=torch.Generator().manual_seed(0))
    swapped = values.clone()
    swapped[[2, 7]] = values[[7, 2]]
    assert fingerprint(swapped, start=0) != fingerprint(values, start=0)
