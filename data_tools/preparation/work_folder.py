"""The work folder of a preparation: what each task reads, where it leaves its shard, how far it is, how it failed.

    CORPUS/.preparing-KEY/plan.json        the domains that this preparation makes
    CORPUS/.preparing-KEY/tokenizer.json   the tokenizer of every task
    CORPUS/.preparing-KEY/shards/00012     what task 12 has made; appears whole
    CORPUS/.preparing-KEY/places           where each document goes, see `decision`; appears whole
    CORPUS/.preparing-KEY/logs/STAGE       datatrove's logs, and its marker of each task that is done
    CORPUS/.preparing-KEY/progress         int64 [tasks, 2]: bytes read, tokens written
    CORPUS/.preparing-KEY/failures         why a task ended early

KEY is a hash of all that the result depends on, so the same command finds its folder again and another one does not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.preparation.sources import Input
from shearing.data.corpus.shards import COUNTS_NAME
from shearing.errors import ShearingError
from shearing.files.durable import flush_folder, write_json

PREFIX = ".preparing-"
PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class Task:
    """What one task reads: files of one domain that follow each other."""

    domain: str
    inputs: tuple[Input, ...]

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.inputs)


def plan_tasks(domain: str, *, inputs: Sequence[Input], task_bytes: int) -> list[Task]:
    """Divide a domain's inputs into tasks: each file is one, but small ones share one up to `task_bytes`.

    What a preparation makes does not depend on this, only how much a kill costs and how many can work at once.
    """
    tasks: list[Task] = []
    together: list[Input] = []
    size = 0
    for each in inputs:
        if together and size + each.bytes > task_bytes:
            tasks.append(Task(domain, tuple(together)))
            together, size = [], 0
        together.append(each)
        size += each.bytes
    if together:
        tasks.append(Task(domain, tuple(together)))
    return tasks


@dataclass(frozen=True)
class WorkFolder:
    """Paths inside a work folder."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / PLAN_NAME

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def places(self) -> Path:
        return self.path / "places"

    @property
    def near_duplicates(self) -> Path:
        return self.path / "near_duplicates"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs.json"

    @property
    def progress(self) -> Path:
        return self.path / "progress"

    @property
    def failures(self) -> Path:
        return self.path / "failures"

    def logs(self, stage: str) -> Path:
        return self.path / "logs" / stage

    def shard(self, rank: int) -> Path:
        return self.path / "shards" / f"{rank:05d}"

    def is_complete(self, rank: int) -> bool:
        return (self.shard(rank) / COUNTS_NAME).is_file()

    def clear_shards(self) -> None:
        """Remove what is large and no longer needed."""
        for folder in (self.path / "shards", self.places, self.near_duplicates):
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def new_shard(self, rank: int) -> Iterator[Path]:
        """An empty folder that becomes shard `rank` when the block ends without an error."""
        final = self.shard(rank)
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in final.parent.glob(f".partial-{rank:05d}-*"):
            shutil.rmtree(left, ignore_errors=True)
        partial = final.with_name(f".partial-{rank:05d}-{os.getpid()}")
        partial.mkdir()
        try:
            yield partial
            shutil.rmtree(final, ignore_errors=True)
            publish(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def report_progress(self, rank: int, *, bytes_read: int, tokens: int) -> None:
        """Say how far a task is; never worth failing for."""
        record = np.array([bytes_read, tokens], dtype=np.int64)
        try:
            descriptor = os.open(self.progress, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, record.tobytes(), rank * record.nbytes)
            finally:
                os.close(descriptor)
        except OSError:
            return

    def read_progress(self, num_tasks: int) -> npt.NDArray[np.int64]:
        """Bytes read and tokens written by each task; int64 [tasks, 2]."""
        found = np.zeros((num_tasks, 2), dtype=np.int64)
        if self.progress.is_file():
            values = np.fromfile(self.progress, dtype=np.int64)[: found.size]
            found.reshape(-1)[: len(values)] = values
        return found

    @contextmanager
    def noting_failure(self, stage: str, rank: int) -> Iterator[None]:
        """Note an error before it goes on its way, which may end in a log on another machine."""
        try:
            yield
        except Exception as error:
            values = {"stage": stage, "rank": rank, "text": f"{type(error).__name__}: {error}"}
            if isinstance(error, ShearingError):
                values |= {"field": error.field, "value": str(error.value)}
                values |= {"allowed": error.allowed, "mend": error.mend}
            write_json(self.failures / f"{stage}-{rank:05d}.json", values)
            raise

    def first_failure(self) -> ShearingError | None:
        """The failure of the first task that failed, if any did."""
        for path in sorted(self.failures.glob("*.json")):
            values = json.loads(path.read_text(encoding="utf-8"))
            if "field" in values:
                return ShearingError(
                    values["field"], value=values["value"], allowed=values["allowed"], mend=values["mend"]
                )
            return ShearingError(
                f"task {values['rank']} of {values['stage']}",
                value=values["text"],
                allowed="a task that ends well",
                mend=f"the log says more: {self.logs(values['stage'])}/logs",
            )
        return None


def publish(partial: Path, final: Path) -> None:
    """Rename a folder whose files are on disk, so that it appears whole also after a power cut."""
    flush_folder(partial)
    partial.rename(final)
    flush_folder(final.parent)
