"""A full disk is told from other errors, and said in the words of whoever knows what was being written."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from shearing.errors import ShearingError
from shearing.files import tensors as tensor_files
from shearing.files.full_disk import full_disk_said, is_disk_full

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError("Not enough free space to write 80000000 bytes after offset 128"),
    OSError("1000 requested and 0 written"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]
OTHERS = [
    OSError(errno.EIO, "Input/output error"),
    OSError("1 argument"),
    SafetensorError("Error while serializing"),
    ValueError("28"),
]
OURS = ShearingError("output", value="there", allowed="a disk with room", mend="free space")


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_full_disk_is_said(error: Exception) -> None:
    assert is_disk_full(error)
    with pytest.raises(ShearingError) as caught, full_disk_said(lambda: OURS):
        raise error
    assert caught.value is OURS
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_pass(error: Exception) -> None:
    assert not is_disk_full(error)
    with pytest.raises(type(error)) as caught, full_disk_said(lambda: pytest.fail("no disk is full")):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [*FULL, *OTHERS], ids=str)
def test_writers_let_the_error_through_and_leave_nothing(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(_: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(tensor_files, "save_file", half)
    with pytest.raises(type(error)) as caught:
        tensor_files.write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(3)})
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []
