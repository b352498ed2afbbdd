"""What tells a row's model from what was in its place before."""

from __future__ import annotations

from pathlib import Path

import pytest

from shearing.runs.stages.evaluation.rows import fingerprint_of


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_other_weights_in_the_same_place_are_another_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"weights")
    before = fingerprint_of(tmp_path, None)
    assert fingerprint_of(tmp_path, None) == before
    (tmp_path / name).write_bytes(b"others")
    assert fingerprint_of(tmp_path, None) != before


def test_files_that_are_not_read_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = fingerprint_of(tmp_path, None)
    (tmp_path / "training_args.bin").write_bytes(b"arguments")
    assert fingerprint_of(tmp_path, None) == before
    assert fingerprint_of(Path("some/model"), "main") == "some/model@main"
