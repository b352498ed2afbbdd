from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import numpy as np
import pytest

from shearing.files.mapped_arrays import ReadAhead, map_array, map_file


def mappings_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def descriptors_of(path: Path) -> int:
    # Of this file alone: others of the process come and go when the collector pleases.
    opened = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            opened += str(descriptor.readlink()) == str(path)
    return opened


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
def test_a_mapped_file_takes_no_descriptor_and_goes_with_its_last_view(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.arange(5000, dtype=np.uint16).tofile(path)
    with path.open("rb"):
        assert descriptors_of(path) == 1
    arrays = [map_file(path, dtype="uint16") for _ in range(50)]
    assert descriptors_of(path) == 0
    assert mappings_of(path) >= 1
    view = arrays[0][4000:4003]
    del arrays
    gc.collect()
    assert view.tolist() == [4000, 4001, 4002]
    del view
    gc.collect()
    assert mappings_of(path) == 0


def test_mapped_files_cannot_be_written_to(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    path.write_bytes(b"\1\0\2\0\3")
    tokens = map_file(path, dtype="uint16")
    assert tokens.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 5
    path.write_bytes(b"")
    assert map_file(path, dtype="uint16").tolist() == []
    with pytest.raises(FileNotFoundError):
        map_file(tmp_path / "nothing", dtype="uint16")


def test_arrays_and_parts_of_them_asked_for(tmp_path: Path) -> None:
    for array in (np.arange(7), np.arange(12, dtype=np.uint64).reshape(3, 4), np.empty(0, dtype=np.int64)):
        np.save(tmp_path / "a.npy", array)
        mapped = map_array(tmp_path / "a.npy")
        assert mapped.dtype == array.dtype
        assert mapped.tolist() == array.tolist()
        ask = ReadAhead(mapped)
        for start, stop in ((0, 3), (2, 10**9), (10**9, 10**9 + 5)):
            ask(start, stop)
    content = (tmp_path / "a.npy").read_bytes()
    for damaged in (content + b"12345678", content[:-1], b"text"):
        (tmp_path / "a.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"header|magic|EOF"):
            map_array(tmp_path / "a.npy")
