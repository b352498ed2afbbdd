"""Checkpoints that are whole or absent, whatever happens while they are written.

A checkpoint is a folder. It is written beside its place, by every process its own files, every file is flushed to disk,
a manifest with each file's size and checksum is added, the folder is renamed into place, `latest` is moved, and only
then older ones go. A rename is atomic, so a folder in place is complete; the manifest finds what a disk has damaged
since.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shearing.errors import ShearingError
from shearing.run_directory import flush_folder, write_text
from shearing.training.fingerprints import Fingerprints, add_fingerprints
from shearing.training.processes import Processes

logger = logging.getLogger(__name__)

FINGERPRINTS = "fingerprints.json"
"""File of a checkpoint: what `sharded.fingerprints` says of its weights and moments."""

_MANIFEST = "manifest.json"
_WRITING = ".writing-"
_REMOVING = ".removing-"
_PREFIX = "step-"
_READ_BYTES = 1 << 24
_Entries = dict[str, dict[str, int]]


class Checkpoints:
    """The checkpoints of one stage, on a file system that all processes share.

    Args:
        folder: where they are; made if absent, and cleared of what an interrupted write left.
        keep_last: checkpoints kept, newest first.
        keep_every: steps; checkpoints at multiples of it are kept for good. None: none are.
        processes: those that write together; all have to call the same methods.
    """

    def __init__(
        self, folder: Path, *, keep_last: int, keep_every: int | None = None, processes: Processes | None = None
    ) -> None:
        self.folder = folder
        self._keep_last, self._keep_every = keep_last, keep_every
        self._processes = processes or Processes()
        self._processes.on_main(self._clear)

    def save(self, *, step: int, write: Callable[[Path], Fingerprints]) -> Path:
        """Write one checkpoint, then remove the oldest ones.

        Args:
            step: optimiser steps done; names the checkpoint.
            write: puts this process's files into the folder it is given: `shard-RANK…` and, on the main process, any
                others, at least one; returns the fingerprints of what is in its shard.

        Returns:
            The checkpoint's folder.

        Raises:
            ShearingError: no space left; the checkpoints that were there are untouched.
        """
        beside = self.folder / f"{_WRITING}{_PREFIX}{step:08d}"
        try:
            self._processes.on_main(lambda: self._make_room(beside))
            parts = self._processes.together(lambda: self._write_own(beside, write=write))
            self._processes.on_main(lambda: self._commit(beside, self.place(step), parts=parts))
        except BaseException as error:
            if self._processes.is_main:
                shutil.rmtree(beside, ignore_errors=True)
            if is_disk_full(error):
                raise no_space(self.folder) from error
            raise
        return self.place(step)

    def place(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def newest(self) -> Path | None:
        """Folder of the newest checkpoint that is undamaged, None if there is none.

        Damaged ones are reported and passed over; the step they are of will be computed again.
        """
        return self._processes.on_main(self._newest_undamaged)

    def _newest_undamaged(self) -> Path | None:
        for folder in self._newest_first():
            damage = _find_damage(folder)
            if damage is None:
                return folder
            logger.warning("checkpoint %s is damaged (%s): going back to the one before it", folder, damage)
        return None

    def _clear(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in self.folder.iterdir():
            if entry.name.startswith(_REMOVING) or entry.name.startswith(_WRITING):
                shutil.rmtree(entry)
            elif entry.name.startswith(".latest."):
                entry.unlink()

    def _make_room(self, beside: Path) -> None:
        """Refuse before a byte is written when the last checkpoint would not fit once more."""
        earlier = self._newest_first()
        if earlier:
            size = sum(path.stat().st_size for path in earlier[0].iterdir())
            if size > shutil.disk_usage(self.folder).free:
                raise no_space(self.folder)
        beside.mkdir()

    def _write_own(self, beside: Path, *, write: Callable[[Path], Fingerprints]) -> tuple[Fingerprints, _Entries]:
        marks = write(beside)
        rank, is_main = self._processes.rank, self._processes.is_main
        own = [
            path
            for path in sorted(beside.rglob("*"))
            # Another process's file is hidden while it is being written.
            if path.is_file()
            and not path.name.startswith(".")
            and (path.name.startswith(f"shard-{rank:05d}") or (is_main and not path.name.startswith("shard-")))
        ]
        return marks, {str(path.relative_to(beside)): _entry(path) for path in own}

    def _commit(self, beside: Path, place: Path, *, parts: list[tuple[Fingerprints, _Entries]]) -> None:
        write_text(beside / FINGERPRINTS, json.dumps(add_fingerprints(marks for marks, _ in parts)) + "\n")
        entries = {name: entry for _, of_process in parts for name, entry in of_process.items()}
        entries[FINGERPRINTS] = _entry(beside / FINGERPRINTS)
        write_text(beside / _MANIFEST, json.dumps(entries, indent=1) + "\n")
        flush_tree(beside)
        if place.exists():
            self._remove(place)  # damaged: a good checkpoint of this step would have been continued from
        beside.rename(place)
        flush_folder(self.folder)
        write_text(self.folder / "latest", place.name + "\n")
        for old in self._newest_first()[self._keep_last :]:
            step = int(old.name.removeprefix(_PREFIX))
            if not self._keep_every or step % self._keep_every:
                self._remove(old)

    def _newest_first(self) -> list[Path]:
        return sorted((entry for entry in self.folder.glob(f"{_PREFIX}*") if entry.is_dir()), reverse=True)

    def _remove(self, folder: Path) -> None:
        # Renamed first, so that a half-removed checkpoint never looks like one.
        removing = self.folder / f"{_REMOVING}{folder.name}"
        folder.rename(removing)
        shutil.rmtree(removing)


def no_space(folder: Path) -> ShearingError:
    """The error for a full disk."""
    return ShearingError(
        "run_dir",
        value=f"{folder}, with {shutil.disk_usage(folder).free / 1e9:.2f} GB free",
        allowed="a disk that can take one more checkpoint",
        mend="free space or choose a run_dir on another disk, lower keep_last, then run the same command again",
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that a disk or a quota is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors wraps the operating system's error in its text.
    return isinstance(error, SafetensorError) and f"os error {errno.ENOSPC}" in str(error)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, exact to the bit, beside its place and renamed into it.

    Args:
        path: file to write; its folder exists.
        tensors: no two may share memory.
        metadata: text for the file's header.

    Raises:
        ShearingError: no space left.
    """
    beside = path.with_name(f".{path.name}.writing")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata=metadata)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if is_disk_full(error):
            raise no_space(path.parent) from error
        raise
    beside.replace(path)
    flush_folder(path.parent)


def write_state(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Write a nested state: tensors to NAME.safetensors, the rest to NAME.json.

    Args:
        folder: existing folder.
        name: name of both files, without suffix.
        state: dicts (keys str or int), lists, tuples, tensors, str, int, float, bool and None; floats are exact too.

    Raises:
        TypeError: any other type.
    """
    tensors: dict[str, Tensor] = {}
    tree = _to_json(state, path="", tensors=tensors)
    write_tensors(folder / f"{name}.safetensors", tensors)
    write_text(folder / f"{name}.json", json.dumps(tree) + "\n")


def read_state(folder: Path, name: str, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `write_state` was given, tensors on `device`."""
    tensors = load_file(folder / f"{name}.safetensors", device=str(device))
    state: dict[str, Any] = _from_json(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), tensors)
    return state


def seed_random(seed: int) -> None:
    """Start every random generator that code under the loop may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """State of every random generator that code under the loop may draw from."""
    generator = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {
            **generator,
            "state": {
                "key": torch.from_numpy(generator["state"]["key"].astype(np.int64)),
                "pos": int(generator["state"]["pos"]),
            },
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set what `random_states` returned; generators of GPUs that are not here are left out."""
    random.setstate(states["python"])
    generator = states["numpy"]
    np.random.set_state(
        {**generator, "state": {**generator["state"], "key": generator["state"]["key"].numpy().astype(np.uint32)}}
    )
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for index, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)


def flush_tree(folder: Path) -> None:
    """Force every file and folder below a folder, and the folder itself, to disk."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            flush_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _entry(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "crc32": _crc32(path)}


def _find_damage(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        for name, entry in manifest.items():
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {entry['bytes']} were written"
            if _crc32(path) != entry["crc32"]:
                return f"the checksum of {name} is wrong"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _crc32(path: Path) -> int:
    # Against damage, not against forgery: ten times as fast as SHA-256 where the processor has no SHA instructions.
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _to_json(value: Any, *, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # A copy, because safetensors refuses views of one memory (multipliers are often slices of a flat tensor).
        tensors[path] = value.detach().clone()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[key, _to_json(item, path=f"{path}/{key}", tensors=tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_to_json(item, path=f"{path}/{index}", tensors=tensors) for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{path or 'state'}: {type(value).__name__} cannot be written to a checkpoint")


def _from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content].clone()
    if kind == "dict":
        return {key: _from_json(item, tensors) for key, item in content}
    items = [_from_json(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
