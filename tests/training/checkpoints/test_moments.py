"""The optimiser state that goes over the cut: written once, read by range."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shearing.training.checkpoints.pieces import (
    MOMENTS,
    WEIGHT,
    Piece,
    SavedMoments,
    ShardedState,
    StagedPieces,
    write_moments,
)

SHAPES = {"matrix": (6, 5), "bias": (7,), "cube": (3, 2, 4)}


def _moments() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    kinds = {kind: {name: torch.randn(shape) for name, shape in SHAPES.items()} for kind in MOMENTS}
    return {**kinds, "step": {name: torch.tensor(12.0) for name in SHAPES}}


@pytest.fixture
def saved(tmp_path: Path) -> SavedMoments:
    moments = ((kind, name, moment) for kind, of_kind in _moments().items() for name, moment in of_kind.items())
    write_moments(tmp_path / "moments.safetensors", moments, shapes=SHAPES)
    return SavedMoments(tmp_path / "moments.safetensors", prefix="model.")


def test_a_file_of_moments_says_whose_they_are(saved: SavedMoments) -> None:
    assert saved.shapes == {f"model.{name}": shape for name, shape in SHAPES.items()}
    assert saved.step == 12.0
    assert saved.kinds == frozenset(MOMENTS)


@pytest.mark.parametrize("kind", MOMENTS)
def test_every_range_is_that_of_the_flattened_tensor(kind: str, saved: SavedMoments) -> None:
    for name, whole in _moments()[kind].items():
        flat = whole.flatten()
        for start in range(flat.numel() + 1):
            for numel in range(flat.numel() + 1 - start):
                found = saved.read(kind, f"model.{name}", start=start, numel=numel)
                assert torch.equal(found, flat[start : start + numel])


def test_moments_of_a_checkpoint_are_read_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _moments()
    pieces = [
        Piece(
            name=f"model.{name}",
            shape=shape,
            start=0,
            values={WEIGHT: torch.zeros(shape).flatten(), **{kind: whole[kind][name].flatten() for kind in MOMENTS}},
        )
        for name, shape in SHAPES.items()
    ]
    StagedPieces(pieces, step=3.0).write(tmp_path / "shard-00000-of-00001.safetensors")
    state, reads = ShardedState(tmp_path), []
    read = state.read
    monkeypatch.setattr(state, "read", lambda kind, name, **of: reads.append(name) or read(kind, name, **of))
    found = state.moments(prefix="model.")
    assert {kind: set(of_kind) for kind, of_kind in found.items()} == {each: set(SHAPES) for each in (*MOMENTS, "step")}
    assert "matrix" in found["exp_avg"]
    assert "elsewhere" not in found["exp_avg"]
    assert not reads
    assert torch.equal(found["exp_avg"]["cube"], whole["exp_avg"]["cube"])
    assert reads == ["model.cube"]
    assert float(found["step"]["bias"]) == 3.0


def test_a_file_without_counts_begins_at_none(tmp_path: Path) -> None:
    save_file({f"{kind}/bias": torch.zeros(2) for kind in MOMENTS}, tmp_path / "moments.safetensors")
    assert SavedMoments(tmp_path / "moments.safetensors").step == 0.0
