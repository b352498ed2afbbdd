"""Files written piece by piece are what safetensors reads, and damage is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shearing.errors import ShearingError
from shearing.files.tensors import (
    StoredTensors,
    overwrite,
    read_header,
    read_range,
    read_tensors,
    write_in_turn,
    write_tensors,
)
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
    path, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    tensors = {f"t{i}": torch.randint(256, (i, 3), dtype=torch.uint8) for i in range(12)}
    tensors |= {"ß": torch.randn(2, 3, 4), "scalar": torch.tensor(2.0), "half": torch.randn(3).to(torch.bfloat16)}
    like = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write_in_turn(path, like, tensors=reversed(tensors.items()), metadata={"what": "bits"})
    save_file(tensors, theirs, metadata={"what": "bits"})
    assert path.read_bytes() == theirs.read_bytes()
    stored = StoredTensors(path)
    assert set(stored) == set(tensors)
    assert len(stored) == len(tensors)
    assert "t3" in stored
    assert "t99" not in stored
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


def test_what_was_not_written_whole_is_not_there(tmp_path: Path) -> None:
    like = {name: torch.empty(4, device="meta") for name in ("a", "b")}
    with pytest.raises(AssertionError, match="b"):
        write_in_turn(tmp_path / "x.safetensors", like, tensors=[("a", torch.zeros(4))], metadata={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_any_range_of_a_tensor(dtype: torch.dtype, tmp_path: Path) -> None:
    whole, path = torch.randint(100, (3, 5)).to(dtype), tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3), "w": whole}, path)
    entry = read_header(path)[0]["w"]
    for start in range(16):
        for numel in range(16 - start):
            found = read_range(path, entry, start=start, numel=numel)
            assert found.dtype == dtype
            assert torch.equal(found, whole.flatten()[start : start + numel])
    assert torch.equal(read_range(path, entry), whole.flatten())
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(ShearingError, match="its end is missing"):
        read_range(path, entry)


@pytest.mark.parametrize("content", [b"", b"no header", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00[]"])
def test_what_is_no_file_of_tensors(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ShearingError, match=r"a whole safetensors file\n.* of a run's compact/, remove that folder"):
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
