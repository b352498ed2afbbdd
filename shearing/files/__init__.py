"""Files that are there whole or not at all: JSON and text, tensors, mapped arrays, results worth keeping."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.files.checksums import sha256_of_file
    from shearing.files.durable import (
        flush_folder,
        flush_tree,
        locked,
        read_json,
        require_writable,
        write_json,
        write_text,
    )
    from shearing.files.full_disk import full_disk_said
    from shearing.files.mapped_arrays import map_array, map_file
    from shearing.files.result_cache import Cached
    from shearing.files.tensors import read_header, read_tensors, write_tensors

__all__ = [
    "Cached",
    "flush_folder",
    "flush_tree",
    "full_disk_said",
    "locked",
    "map_array",
    "map_file",
    "read_header",
    "read_json",
    "read_tensors",
    "require_writable",
    "sha256_of_file",
    "write_json",
    "write_tensors",
    "write_text",
]

__getattr__ = late(
    __name__,
    {
        "Cached": "result_cache",
        "flush_folder": "durable",
        "flush_tree": "durable",
        "full_disk_said": "full_disk",
        "locked": "durable",
        "map_array": "mapped_arrays",
        "map_file": "mapped_arrays",
        "read_header": "tensors",
        "read_json": "durable",
        "read_tensors": "tensors",
        "require_writable": "durable",
        "sha256_of_file": "checksums",
        "write_json": "durable",
        "write_tensors": "tensors",
        "write_text": "durable",
    },
)
