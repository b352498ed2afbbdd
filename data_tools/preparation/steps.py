"""Steps of datatrove's pipelines: read, tokenise into a shard, decide what is held out, write domains, finish.

A task of the first two: [`ReadTexts`, `TokeniseShard`], and after them MinHash signatures where near-duplicates are
looked for. datatrove marks a task as done when its pipeline has ended; a shard is on disk before that.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import multiprocess
import numpy as np
import numpy.typing as npt
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers.base import BaseReader

from data_tools.corpus_output import publishing, require_nothing_skipped, standing
from data_tools.preparation.decision import Decision
from data_tools.preparation.forms import Form
from data_tools.preparation.reading import OTHERWISE, SourceStream, open_source, texts_of
from data_tools.preparation.sources import Input
from data_tools.preparation.work_folder import Task, WorkFolder
from data_tools.tokenisation import batches
from shearing.data.corpus.domain_folder import (
    DomainSettings,
    decide_places,
    earlier_texts,
    is_complete,
    require_divided_as_before,
    write_domain_folder,
    write_index,
)
from shearing.data.corpus.format import SourceFile
from shearing.data.corpus.shards import Shard, ShardWriter
from shearing.data.corpus.splits import Documents
from shearing.data.texts.bad_input import BadInput
from shearing.data.texts.chat import ChatTokenizer
from shearing.data.texts.encoding import Encoded, PlainTokenizer
from shearing.errors import ShearingError, named
from shearing.runs.names import COMPONENT_NAMES

NearDuplicates = Literal["ignore", "together", "remove"]

TOKENISE, DECIDE, WRITE, FINISH = "tokenise", "decide", "write", "finish"


@dataclass
class Reading:
    """What the reader tells the step after it, beside documents."""

    left_out: dict[str, int] = field(default_factory=dict)
    sources: list[SourceFile] = field(default_factory=list)
    bytes_read: int = 0


class ReadTexts(BaseReader):  # type: ignore[misc]
    """Reads the files of a task; see `reading`.

    Args:
        tasks: of all ranks.
        forms: of their domains.
        separator: divides text files.
        reading: shared with the step after this one.
    """

    name = "📚 files of a task"

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        forms: Mapping[str, Form],
        separator: str | None,
        policy: Literal["stop", "skip"],
        max_document_bytes: int,
        documents_per_file: int | None,
        reading: Reading,
    ) -> None:
        super().__init__()
        self.tasks = tasks
        self.forms = forms
        self.separator = separator
        self.policy = policy
        self.max_document_bytes = max_document_bytes
        self.documents_per_file = documents_per_file
        self.reading = reading

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:  # noqa: ARG002
        bad = BadInput(self.policy, self.max_document_bytes, OTHERWISE)
        form = self.forms[self.tasks[rank].domain]
        reading = self.reading
        reading.left_out, reading.sources, reading.bytes_read = bad.left_out, [], 0
        before = 0
        for source in self.tasks[rank].inputs:
            stream = None if source.hub else open_source(source)
            try:
                texts = texts_of(source, stream, chat=form.chat, separator=self.separator, bad=bad)
                for text in islice(texts, self.documents_per_file):
                    # What is no stream of bytes says nothing of its position; the text is about as long.
                    step = 0 if stream else len(text.text)
                    position = stream.position if stream else reading.bytes_read - before + step
                    reading.bytes_read = before + min(position, source.bytes)
                    if text.text.strip():
                        yield Document(text=text.text, id=text.place)
                    else:
                        bad.left_out["empty"] += 1
                checksum = _checksum(source, stream)
            finally:
                if stream:
                    stream.release()
            reading.sources.append(SourceFile(path=source.path, bytes=source.bytes, checksum=checksum))
            before += source.bytes
            reading.bytes_read = before


def _checksum(source: Input, stream: SourceStream | None) -> str:
    if source.etag:
        return f"etag:{source.etag}"
    return stream.checksum() if stream else ""


class TokeniseShard(PipelineStep):  # type: ignore[misc]
    """Tokenises the documents of a task into its shard, and hands them on if a step comes after this one.

    While the tokenizer works on one batch, outside Python's lock, the next one is read.

    Args:
        work: the work folder.
        forms: of the documents of each rank.
        reading: shared with the reader.
        threads: cores that the tokenizer may use.
        hand_on: whether a step comes after this one.
    """

    type = "✂️ - TOKENISE"
    name = "shard of a task"

    def __init__(
        self,
        work: WorkFolder,
        *,
        forms: Sequence[Form],
        settings: DomainSettings,
        reading: Reading,
        threads: int,
        hand_on: bool,
    ) -> None:
        super().__init__()
        self.work = work
        self.forms = forms
        self.settings = settings
        self.reading = reading
        self.threads = threads
        self.hand_on = hand_on

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:  # noqa: ARG002
        with self.work.noting_failure(TOKENISE, rank), _tokenizer_threads(self.threads):
            # Whole already, killed before it was marked; only a step after this one needs the texts again.
            if self.work.is_complete(rank) and not self.hand_on:
                return
            with self.work.new_shard(rank) as folder:
                for batch in self._write(folder, data, rank=rank):
                    if self.hand_on:
                        yield from batch

    def _write(self, folder: Path, data: Iterator[Document], *, rank: int) -> Iterator[list[Document]]:
        form = self.forms[rank]
        tokenizer = _tokenizer(self.work.tokenizer, form)
        writer = ShardWriter(
            folder,
            vocab_size=self.settings.vocab_size,
            separator_id=self.settings.separator_id,
            begin_id=self.settings.begin_id,
            counted=form.answers,
        )
        parent = os.getppid() if multiprocess.parent_process() else None
        try:
            for batch, encodings in _read_ahead(data, tokenizer=tokenizer):
                for document in batch:
                    document.text = form.plain(document.text)
                writer.add(
                    [each.text.encode() for each in batch],
                    token_ids=[each.ids for each in encodings],
                    counted=[each.counted for each in encodings if each.counted is not None],
                )
                self.work.report_progress(rank, bytes_read=self.reading.bytes_read, tokens=writer.tokens)
                if parent is not None and os.getppid() != parent:
                    raise SystemExit("the preparation that started this task has ended")
                yield batch
            writer.close(sources=self.reading.sources, left_out=self.reading.left_out)
        except BaseException:
            writer.abandon()
            raise
        self.work.report_progress(rank, bytes_read=self.reading.bytes_read, tokens=writer.tokens)


@lru_cache(maxsize=1)
def _tokenizer(path: Path, form: Form) -> PlainTokenizer | ChatTokenizer:
    """The tokenizer of a work folder; a process has many tasks, and building one takes half a second."""
    return form.tokenizer(path)


def _read_ahead(
    data: Iterator[Document], *, tokenizer: PlainTokenizer | ChatTokenizer
) -> Iterator[tuple[list[Document], list[Encoded]]]:
    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[list[Document], Future[list[Encoded]]] | None = None
        for batch in batches(data, characters=lambda document: len(document.text)):
            future = pool.submit(tokenizer.encode, [document.text for document in batch])
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = (batch, future)
        if waiting:
            yield waiting[0], waiting[1].result()


@contextmanager
def _tokenizer_threads(threads: int) -> Iterator[None]:
    wanted = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@dataclass(frozen=True)
class Assembly:
    """What has to be known to make domains of shards.

    Args:
        output: folder of the corpus.
        domains: of this preparation, with the ranks of their tasks.
        inputs: of each domain, for its manifest.
    """

    output: Path
    domains: Mapping[str, range]
    inputs: Mapping[str, str]
    settings: DomainSettings
    remove_duplicates: bool
    near_duplicates: NearDuplicates
    policy: Literal["stop", "skip"]


class _Single(PipelineStep):  # type: ignore[misc]
    """A step that is a whole task by itself."""

    type = "🧩 - ASSEMBLE"

    def __init__(self, work: WorkFolder, assembly: Assembly) -> None:
        super().__init__()
        self.work = work
        self.assembly = assembly

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Any:  # noqa: ARG002
        with self.work.noting_failure(self.name, rank):
            self.do(rank)

    def do(self, rank: int) -> None:
        raise TypeError(f"{type(self).__name__} does nothing for {rank}")


class DecidePlaces(_Single):
    """Decides over all documents of all domains where each goes, once: a kill afterwards changes nothing.

    It is decided anew if other domains have come into the folder since. Those that this preparation has published by
    then stand like all others.
    """

    name = DECIDE

    def do(self, rank: int) -> None:  # noqa: ARG002
        assembly = self.assembly
        decision = Decision(self.work.places, assembly.output)
        if decision.holds():
            return
        known = standing(assembly.output)  # before their texts are read: what comes meanwhile is not known
        shards = {name: [Shard.open(self.work.shard(r)) for r in ranks] for name, ranks in assembly.domains.items()}
        clusters = self._clusters(shards)
        domains = {}
        for name, each in shards.items():
            if assembly.policy == "stop":
                for shard in each:
                    mend = f"delete {self.work.path} and start from the beginning"
                    require_nothing_skipped(name, left_out=shard.left_out, mend=mend)
            domains[name] = Documents.of_shards(each, clusters=clusters.get(name))
            if not len(domains[name].hashes):
                left_out = sum((sum(shard.left_out.values()) for shard in each), start=0)
                raise ShearingError(
                    f"domain {name}",
                    value=f"no text ({left_out} documents were left out)",
                    allowed="at least three documents",
                    mend="check its files, and the field that holds the text",
                )
        places = decide_places(
            domains,
            sizes=assembly.settings.sizes,
            seed=assembly.settings.split_seed,
            earlier=earlier_texts(assembly.output),
            remove_duplicates=assembly.remove_duplicates,
            remove_near_duplicates=assembly.near_duplicates == "remove",
        )
        require_divided_as_before(assembly.output, domains=domains, places=places, inputs=assembly.inputs)
        decision.write(places, known=known)

    def _clusters(self, shards: Mapping[str, Sequence[Shard]]) -> dict[str, npt.NDArray[np.int64]]:
        if self.assembly.near_duplicates == "ignore":
            return {}
        from data_tools.preparation.near_duplicates import read_clusters

        return {
            name: np.concatenate(
                [
                    read_clusters(self.work.near_duplicates, rank=rank, documents=shard.documents)
                    for rank, shard in zip(self.assembly.domains[name], each, strict=True)
                ]
            )
            for name, each in shards.items()
        }


class WriteDomain(_Single):
    """Writes the files of one domain and publishes it."""

    name = WRITE

    def do(self, rank: int) -> None:
        assembly = self.assembly
        name = list(assembly.domains)[rank]
        final = assembly.output / name
        if is_complete(final, inputs=assembly.inputs[name]):
            return
        decision = Decision(self.work.places, assembly.output)
        decision.require()
        partial = assembly.output / f".partial-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write_domain_folder(
            partial,
            name=name,
            shards=[Shard.open(self.work.shard(each)) for each in assembly.domains[name]],
            places=decision.places(name),
            settings=assembly.settings,
            inputs=assembly.inputs[name],
        )
        decision.publish(partial, final)


class FinishCorpus(_Single):
    """Writes the index of the corpus, and removes the shards."""

    name = FINISH

    def do(self, rank: int) -> None:  # noqa: ARG002
        with publishing(self.assembly.output), named(COMPONENT_NAMES):
            write_index(
                self.assembly.output,
                tokenizer_fingerprint=self.assembly.settings.tokenizer_fingerprint,
                tokenizer_json=self.work.tokenizer.read_text(encoding="utf-8"),
            )
        self.work.clear_shards()
