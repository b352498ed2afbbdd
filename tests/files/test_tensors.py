"""Files written piece by piece are what safetensors reads, and damage is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shearing.errors import ShearingError
from shearing.files.tensors import overwrite, read_header, read_tensors, write_in_turn, write_tensors
from shearing.pruning.sparse.stored.masks import mask_shapes, read_masks, write_masks


def test_overwriting_leaves_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {name: torch.randn(3, 5).to(dtype) for name, dtype in (("a", torch.bfloat16), ("b", torch.float32))}
    save_file(tensors, path, metadata={"format": "pt"})
    new = torch.full((3, 5), -0.0, dtype=torch.bfloat16)
    overwrite(path, {"a": new})
    found = load_file(path)
    assert torch.equal(found["a"].view(torch.int16), new.view(torch.int16))
    assert torch.equal(found["b"], tensors["b"])
    assert read_header(path)[1] == {"format": "pt"}
    assert torch.equal(read_tensors(path, ["b"])["b"], tensors["b"])


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
def test_who_may_read_a_file_is_as_the_umask_says(umask: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / ".model.safetensors.writing").touch(mode=0o600)  # left by a kill
    before = os.umask(umask)
    try:
        write_tensors(path, {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [path]


def test_writing_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "bits.safetensors"
    tensors = {f"t{i}": torch.randint(256, (i + 1,), dtype=torch.uint8) for i in range(5)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_in_turn(path, shapes, tensors=reversed(tensors.items()), metadata={"what": "bits"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("content", [b"", b"no header", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00[]"])
def test_what_is_no_file_of_tensors(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ShearingError, match="a whole safetensors file"):
        read_header(path)


def test_a_file_of_tensors_that_are_no_masks(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, dtype=torch.uint8)}, path)
    with pytest.raises(ShearingError, match="shearing masks 1"):
        mask_shapes(path)
    masks = {"a": torch.rand(3, 7) > 0.5, "b": torch.rand(1, 9) > 0.5}
    from shearing.pruning.sparse.stored.masks import pack

    write_masks(
        path,
        shapes={name: tuple(mask.shape) for name, mask in masks.items()},
        packed=((name, pack(mask)) for name, mask in masks.items()),
    )
    assert all(torch.equal(mask, masks[name]) for name, mask in read_masks(path))
