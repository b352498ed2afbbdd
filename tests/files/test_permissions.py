"""What may not be read is told from what is not there, and from what is the matter otherwise."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from shearing.files.permissions import forbidden


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Paths that the system says may not be used; root may use all."""
    paths: list[Path] = []
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *how: Path(path) not in paths and access(path, *how))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("text")
    return paths


@pytest.mark.parametrize("name", ["folder", "folder/file"])
def test_what_is_closed_is_named(name: str, closed: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    assert forbidden(path) is None
    closed.append(tmp_path / name)
    error = forbidden(path)
    assert error is not None
    assert error.field == str(path)
    assert error.mend == f"there is no read permission for {tmp_path / name}: mend the permission"


def test_a_folder_may_be_what_was_to_be_read(closed: list[Path], tmp_path: Path) -> None:
    closed.append(tmp_path / "folder")
    assert forbidden(tmp_path / "folder") is not None


def test_what_is_not_there_is_not_forbidden(closed: list[Path], tmp_path: Path) -> None:
    closed.append(tmp_path / "nothing")
    assert forbidden(tmp_path / "nothing") is None
    assert forbidden(tmp_path / "nothing" / "file", error=FileNotFoundError(errno.ENOENT, "none")) is None


@pytest.mark.parametrize(
    ("error", "said"), [(PermissionError(errno.EACCES, "no"), True), (OSError(errno.EIO, "no"), False), (None, False)]
)
def test_the_systems_own_word_counts(error: Any, said: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    assert (forbidden(tmp_path / "file", error=error) is not None) == said
