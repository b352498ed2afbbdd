"""Checkpoints that are whole or absent, whatever happens while they are written.

A checkpoint is a folder. It is written beside its place, by every process its own files, every file is flushed to disk
and read back, a manifest with each file's size and checksum is added, the folder is renamed into place, `latest` is
moved, and only then older ones go. A rename is atomic, so a folder in place is complete; the manifest finds what a disk
has damaged since.

Files may be written by a thread while training goes on. What all processes have to agree on is done by their main
threads, once every one has written and flushed its own.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from shearing.errors import ShearingError, key
from shearing.files.durable import flush_file, flush_folder, flush_tree, write_text
from shearing.files.full_disk import full_disk_said
from shearing.processes.processes import Processes
from shearing.training.checkpoints.fingerprints import Fingerprints, add_fingerprints

logger = logging.getLogger(__name__)

FINGERPRINTS = "fingerprints.json"
"""File of a checkpoint: what `pieces.fingerprints` says of its weights and moments."""

_MANIFEST = "manifest.json"
_WRITING = ".writing-"
_REMOVING = ".removing-"
_PREFIX = "step-"
_READ_BYTES = 1 << 24
_Entries = dict[str, dict[str, int]]


def no_space(folder: Path) -> ShearingError:
    """That the disk under a folder of a run is full."""
    return ShearingError(
        "folder",
        value=f"{folder}, with {shutil.disk_usage(folder).free / 1e9:.2f} GB free",
        allowed="a disk that can take one more checkpoint",
        mend=f"free space or choose a {key('folder')} on another disk, lower keep_last, then run the same command "
        "again",
    )


class Checkpoints:
    """The checkpoints of one stage, on a file system that all processes share.

    Args:
        folder: where they are; made if absent, and cleared of what an interrupted write left.
        keep_last: checkpoints kept, newest first.
        keep_every: steps; checkpoints at multiples of it are kept for good. None: none are.
        keep: step whose checkpoint is kept for good too.
        processes: those that write together; all have to call the same methods.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        keep_every: int | None = None,
        keep: int | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.folder = folder
        self._keep_last, self._keep_every, self._keep = keep_last, keep_every, keep
        self._processes = processes or Processes()
        self._writing: tuple[int, Path, _Part] | None = None
        self._damaged: set[Path] = set()
        self._processes.on_main(self._clear)

    def save(self, *, step: int, write: Callable[[Path], Fingerprints]) -> Path:
        """Write one checkpoint, then remove the oldest ones; `begin` and `finish` without anything in between.

        Args:
            step: optimiser steps done; names the checkpoint.
            write: see `begin`.

        Returns:
            The checkpoint's folder.

        Raises:
            ShearingError: no space left; the checkpoints that were there are untouched.
        """
        self.begin(step=step, write=write, background=False)
        return self.finish()

    def begin(self, *, step: int, write: Callable[[Path], Fingerprints], background: bool) -> None:
        """Begin a checkpoint, which is there once `finish` has returned; the one before has to be finished.

        Args:
            step: optimiser steps done; names the checkpoint.
            write: puts this process's files into the folder it is given: `shard-RANK…` and, on the main process, any
                others, at least one; returns the fingerprints of what is in its shard.
            background: in a thread, from now on; otherwise in `finish`.

        Raises:
            ShearingError: no space left; the checkpoints that were there are untouched.
        """
        assert self._writing is None, "one after the other"
        beside = self.folder / f"{_WRITING}{_PREFIX}{step:08d}"
        # Around what each process does, not around the meeting: all have to agree on the error that is raised.
        said = full_disk_said(lambda: no_space(self.folder))
        self._processes.on_main(said(lambda: self._make_room(beside)))
        part = _Part(said(lambda: self._write_own(beside, write=write)), background=background)
        self._writing = (step, beside, part)

    @property
    def is_written(self) -> bool:
        """Whether this process's part of what was begun is written, or cannot be."""
        return self._writing is not None and self._writing[2].is_done

    def finish(self) -> Path:
        """Wait until every process has written its part, and put the checkpoint into place.

        Returns:
            Its folder.

        Raises:
            ShearingError: as `begin`.
        """
        assert self._writing is not None
        (step, beside, part), self._writing = self._writing, None
        said = full_disk_said(lambda: no_space(self.folder))
        try:
            parts = self._processes.together(part.result)
            self._processes.on_main(said(lambda: self._commit(beside, self.place(step), parts=parts)))
        except BaseException:
            if self._processes.is_main:
                shutil.rmtree(beside, ignore_errors=True)
            raise
        return self.place(step)

    def abandon(self) -> None:
        """Wait until this process has written its part of what was begun, which nobody will finish."""
        if self._writing is not None:
            self._writing[2].wait()

    def place(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def newest(self) -> Path | None:
        """Folder of the newest checkpoint that is undamaged, None if there is none; each process looks at its share.

        Damaged ones are reported and passed over; the step they are of will be computed again, and they go behind it.
        """
        processes = self._processes
        folders = processes.on_main(self._newest_first)
        for number, folder in enumerate(folders, start=1):
            found = processes.together(partial(damage_of, folder, share=(processes.rank, processes.size)))
            damage = next((said for said in found if said is not None), None)
            if damage is None:
                return folder
            self._damaged.add(folder)
            if processes.is_main:
                follows = (
                    "going back to the one before it"
                    if number < len(folders)
                    else "no undamaged checkpoint is left, so the stage starts again from its first step"
                )
                logger.warning("checkpoint %s is damaged (%s): %s", folder, damage, follows)
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
        for path in own:
            flush_file(path)
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
        self._damaged.discard(place)
        # Those of later steps are damaged: training has passed them over, and will come by them again. Not every one is
        # written once more, as one of a stop is not, so what is known to be damaged goes before any that is not.
        before = [old for old in self._newest_first() if step_of(old) < step_of(place)]
        for old in self._damaged.intersection(before):
            self._remove(old)
            before.remove(old)
        for old in before[self._keep_last - 1 :]:
            step = step_of(old)
            if step != self._keep and (not self._keep_every or step % self._keep_every):
                self._remove(old)

    def _newest_first(self) -> list[Path]:
        return list(reversed(checkpoints_in(self.folder).values()))

    def _remove(self, folder: Path) -> None:
        # Renamed first, so that a half-removed checkpoint never looks like one.
        removing = self.folder / f"{_REMOVING}{folder.name}"
        folder.rename(removing)
        shutil.rmtree(removing)


class _Part:
    """What a process has to write: in a thread, or when its result is asked for."""

    def __init__(self, write: Callable[[], tuple[Fingerprints, _Entries]], *, background: bool) -> None:
        self._write = write
        self._result: tuple[Fingerprints, _Entries] | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if background:
            # A process that ends does not wait for it: what it leaves is no checkpoint.
            self._thread = threading.Thread(target=self._try, name="checkpoint", daemon=True)
            self._thread.start()

    @property
    def is_done(self) -> bool:
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def result(self) -> tuple[Fingerprints, _Entries]:
        if self._thread is None:
            return self._write()
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _try(self) -> None:
        try:
            self._result = self._write()
        except BaseException as error:  # noqa: BLE001  raised where the result is asked for
            self._error = error


def _entry(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "crc32": _crc32(path)}


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Steps done -> the checkpoint of a stage that was taken then, oldest first; none is looked into."""
    found = (entry for entry in folder.glob(f"{_PREFIX}*") if entry.is_dir())
    # Somebody's copy beside them, as step-00000010-old, is none.
    own = (entry for entry in sorted(found) if entry.name.removeprefix(_PREFIX).isdecimal())
    return {step_of(entry): entry for entry in own}


def step_of(checkpoint: Path) -> int:
    """Steps done when a checkpoint was taken, by its folder's name."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def damage_of(folder: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """What a disk has done to a checkpoint since it was written, in words; None: nothing.

    Args:
        folder: the checkpoint.
        share: (which, of how many) of its files; by default all.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        which, of = share
        for name, entry in sorted(manifest.items())[which::of]:
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
