"""`sparsity.json`, beside a sparse model: what was done to it, and the checksum of each of its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shearing.errors import ShearingError
from shearing.files.checksums import sha256_of_file
from shearing.files.durable import read_json

MANIFEST = "sparsity.json"
FORMAT = 1
SHOWN_LEVELS = 4
"""More of them are not named one by one."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a sparse model.

    Raises:
        ShearingError: there is none, or one that this version cannot read.
    """
    return read_description(
        folder / MANIFEST,
        version=FORMAT,
        of="a model that `shear sparsify` has written",
        mend="give the folder that was its output",
        again="sparsify again",
    )


def read_description(path: Path, *, version: int, of: str, mend: str, again: str) -> dict[str, Any]:
    """What a file of ours says about the model beside it.

    Args:
        path: the file, in the folder of the model.
        version: its `format` has to be this.
        of: what kind of model has such a file.
        mend: where there is none: what to do.
        again: where it is of another version: how to have it in this one.

    Raises:
        ShearingError: there is none, or it is of another version.
    """
    if not path.is_file():
        raise ShearingError(str(path.parent), value=f"no {path.name}", allowed=of, mend=mend)
    said = read_json(path)
    if said.get("format") != version:
        raise ShearingError(str(path), value=f"format {said.get('format')}", allowed=f"format {version}", mend=again)
    return said


def in_short(manifest: Mapping[str, Any]) -> str:
    """What was done to a model, for the heading of a column: 'magnitude 2:4', or 'magnitude, depth, 50 %'."""
    criterion, pattern = manifest["criterion"], manifest["pattern"]
    if pattern.count(",") < SHOWN_LEVELS:
        return f"{criterion} {pattern}"
    return f"{criterion}, {manifest['allocation']}, {100 * manifest['budget']['reached']['sparsity']:.3g} %"


def file_entries(
    folder: Path, *, names: Sequence[str], advance: Callable[[int], None] = lambda _: None
) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files, as a manifest has them under `files`."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name, advance=advance)}
        for name in names
    }


def reached_budget(matrices: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Weights kept, of how many, and the share removed, over matrices as a manifest describes them."""
    described = list(matrices)
    kept = sum(int(about["kept"]) for about in described)
    of = sum(math.prod(about["shape"]) for about in described)
    return {"kept": kept, "of": of, "sparsity": 1 - kept / of}
