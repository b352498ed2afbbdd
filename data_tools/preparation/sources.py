"""Which files a domain is made of: paths, folders, globs, URLs and data sets of the hub to a sorted list of inputs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from data_tools.preparation.recipe import HUB_PREFIX, DomainSources
from shearing.data.texts.chat import ChatTemplate
from shearing.data.texts.documents import TextFile
from shearing.data.texts.kinds import ENDINGS, Compression, Kind, kind_of
from shearing.errors import ShearingError
from shearing.files.permissions import forbidden
from shearing.files.states import states_of
from shearing.settings.extras import require_extra

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


# A piece of a data set that is read by row numbers: some seconds of work.
ROWS_PER_PIECE = 100_000


@dataclass(frozen=True)
class HubPiece:
    """Rows [start, end) of a data set, or, streamed, its shard `start` of `end`."""

    name: str
    config: str | None
    split: str
    revision: str | None
    streaming: bool
    start: int
    end: int


@dataclass(frozen=True)
class Input:
    """One file, or piece of a data set, that a single task reads from its beginning to its end.

    Args:
        path: absolute, or a URL, or `hf:NAME` and the piece.
        bytes: its size, compressed as it lies there; 0 if nobody says.
        stamp: when it was changed, or a tag of its content; with path and size it tells whether it is still the same.
        etag: the store's own checksum, where it has one.
        text_field: field of the text.
    """

    path: str
    kind: Kind | Literal["hub"]
    bytes: int
    stamp: str
    text_field: str
    compression: Compression | None = None
    etag: str | None = None
    hub: HubPiece | None = None

    def file(self, *, chat: ChatTemplate | None) -> TextFile:
        """What readers are told; `chat` renders what is in the field, None: it is text."""
        kind = "lines" if self.kind == "hub" else self.kind
        return TextFile(self.path, kind, self.text_field, self.compression, chat)

    @property
    def identity(self) -> list[object]:
        return [self.path, self.bytes, self.stamp, self.text_field]


@dataclass(frozen=True)
class Found:
    """Inputs of a domain in the order of its documents on disk, and how many files were passed over."""

    inputs: tuple[Input, ...]
    passed_over: int


def find_inputs(domain: str, *, sources: DomainSources) -> Found:
    """List what a domain is made of, without reading it; nothing of `sources` is unset (`PreparationRecipe.domain`).

    Raises:
        ShearingError: a path that does not exist or holds nothing that can be read, or is named twice.
    """
    text_field = sources.text_field
    assert text_field is not None
    inputs: list[Input] = []
    passed_over = 0
    for path in sources.paths:
        if path.startswith(HUB_PREFIX) and not path.startswith("hf://"):
            inputs += _hub_inputs(domain, name=path.removeprefix(HUB_PREFIX), sources=sources, text_field=text_field)
            continue
        found = list(_files(domain, path=path, split=sources.split))
        chosen = [each for each in found if kind_of(each[0]) is not None]
        passed_over += len(found) - len(chosen)
        if not chosen:
            raise forbidden(Path(path)) or ShearingError(
                f"domains.{domain}",
                value=path,
                allowed=f"a file, or a folder or pattern with files, ending in {ENDINGS}",
                mend="convert the text to one of these" if found else "there are no files: check the path",
            )
        inputs += [_input(name, info=info, text_field=text_field) for name, info in chosen]
    seen: set[str] = set()
    for each in inputs:
        if each.path in seen:
            raise ShearingError(
                f"domains.{domain}",
                value=each.path,
                allowed="each file once",
                mend="two of the domain's paths hold this file: name it in one of them",
            )
        seen.add(each.path)
    return Found(inputs=tuple(inputs), passed_over=passed_over)


def open_file_system(path: str) -> tuple[Any, str]:
    """Fsspec's file system behind a path or URL, and the path inside it.

    Raises:
        ShearingError: a protocol that is unknown, or whose package is missing.
    """
    from fsspec.core import url_to_fs

    try:
        file_system, inside = url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ShearingError(
            "domains",
            value=path,
            allowed="a path, or a URL that fsspec can open",
            mend=f"install what it needs: {error}" if isinstance(error, ImportError) else str(error),
        ) from error
    return file_system, inside


def load_hub_dataset(piece: HubPiece) -> Dataset | IterableDataset:
    """A data set by name, as `datasets` loads it: a name of the hub, or a folder of data files.

    Raises:
        ShearingError: it cannot be found or read.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(
            piece.name, piece.config, split=piece.split, revision=piece.revision, streaming=piece.streaming
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ShearingError(
            "domains",
            value=f"{HUB_PREFIX}{piece.name}",
            allowed="a data set that `datasets` can load, with its config and split",
            mend=str(error).splitlines()[0],
        ) from error
    assert isinstance(loaded, (datasets.Dataset, datasets.IterableDataset))
    return loaded


def _files(domain: str, *, path: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every file behind a path, sorted, with what the file system says of it."""
    from fsspec.implementations.local import LocalFileSystem

    file_system, inside = open_file_system(path)
    local = isinstance(file_system, LocalFileSystem)
    try:
        if local and Path(inside).is_dir():
            _require_listed(inside)
        found = _matching(file_system, inside, path=path, split=split)
    except OSError as error:
        no_permission = forbidden(Path(error.filename or inside), error=error) if local else None
        raise no_permission or ShearingError(
            f"domains.{domain}", value=path, allowed="something that can be read", mend=f"{error}"
        ) from error
    if found is None:
        raise ShearingError(
            f"domains.{domain}",
            value=path,
            allowed="a file or folder that exists",
            mend="correct the path" + ("" if local else ", or the credentials"),
        )
    for name in sorted(found):
        yield (name if local else file_system.unstrip_protocol(name)), found[name]


def _matching(file_system: Any, inside: str, *, path: str, split: str) -> dict[str, Mapping[str, Any]] | None:
    """Names to information; None if there is nothing of that name."""
    from fsspec.core import has_magic

    if has_magic(path):
        found = file_system.glob(inside, detail=True)
    elif file_system.isdir(inside):
        root = inside.rstrip("/")
        if file_system.exists(f"{root}/dataset_dict.json"):
            root = f"{root}/{split}"
        if file_system.exists(f"{root}/state.json"):  # of `datasets.save_to_disk`: caches lie beside the data
            found = file_system.glob(f"{root}/data-*.arrow", detail=True)
        else:
            found = file_system.find(root, detail=True)
        below = {name: PurePosixPath(name).relative_to(PurePosixPath(root)).parts for name in found}
        found = {name: info for name, info in found.items() if not any(part[0] == "." for part in below[name])}
    elif file_system.isfile(inside):
        found = {inside: file_system.info(inside)}
    else:
        return None
    return {name: info for name, info in found.items() if info["type"] != "directory"}


def _require_listed(folder: str) -> None:
    """Check that a folder of this machine and those below it can be listed: fsspec passes over what cannot.

    Raises:
        OSError: one cannot.
    """

    def stop(error: OSError) -> None:
        raise error

    for _, below, _ in os.walk(folder, onerror=stop):
        below[:] = [name for name in below if name[0] != "."]


def _input(path: str, *, info: Mapping[str, Any], text_field: str) -> Input:
    how = kind_of(path)
    assert how is not None
    kind, compression = how
    local = "://" not in path
    etag = next((str(info[key]).strip('"') for key in ("ETag", "etag", "md5Hash", "xet_hash") if info.get(key)), None)
    changed = next((str(info[key]) for key in ("LastModified", "mtime", "created") if info.get(key)), "")
    return Input(
        path=path,
        kind=kind,
        bytes=int(info.get("size") or 0),
        stamp=str(Path(path).stat().st_mtime_ns) if local else etag or changed,
        text_field=text_field,
        compression=compression,
        etag=etag,
    )


def _hub_inputs(domain: str, *, name: str, sources: DomainSources, text_field: str) -> list[Input]:
    require_extra("data", modules=["datasets"], what=f"domains.{domain}")
    revision = _revision(name, revision=sources.revision)
    whole = HubPiece(name, sources.config, sources.split, revision, sources.streaming, 0, 0)
    loaded = load_hub_dataset(whole)
    columns = loaded.column_names
    if columns is not None and not {text_field, text_field.partition(".")[0]} & set(columns):
        raise ShearingError(
            f"domains.{domain}",
            value=f"a data set with the fields {', '.join(columns)}",
            allowed=f"text in the field {text_field!r}",
            mend="name the field that holds the text with text_field",
        )
    pieces: Sequence[tuple[int, int]]
    if sources.streaming:
        pieces = [(i, loaded.num_shards) for i in range(loaded.num_shards)]
        stamp = revision or _stamp_of(Path(name))
    else:
        rows = len(loaded)
        pieces = [(start, min(start + ROWS_PER_PIECE, rows)) for start in range(0, rows, ROWS_PER_PIECE)]
        stamp = revision or loaded._fingerprint  # noqa: SLF001 (nothing public identifies a data set without a revision)
    in_all = (loaded.info.splits or {}).get(sources.split)
    size = int(in_all.num_bytes or 0) // len(pieces) if in_all and pieces else 0
    kind = "shard" if sources.streaming else "rows"
    where = "/".join(filter(None, [sources.config, sources.split]))
    return [
        Input(
            path=f"{HUB_PREFIX}{name} ({where}, {kind} {start} to {end})",
            kind="hub",
            bytes=size,
            stamp=stamp,
            text_field=text_field,
            etag=revision,
            hub=HubPiece(name, sources.config, sources.split, revision, sources.streaming, start, end),
        )
        for start, end in pieces
    ]


def _stamp_of(folder: Path) -> str:
    """Tells a folder of data files, hidden ones aside, from another state of it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    seen = [path for path in files if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    return hashlib.sha256(json.dumps(states_of(seen, within=folder)).encode()).hexdigest()[:32]


def _revision(name: str, *, revision: str | None) -> str | None:
    """The commit that a name of the hub stands for now, so that what is read does not change between tasks.

    None for a folder of this machine.
    """
    if os.path.isdir(name):  # noqa: PTH112 (a name that may also be no path)
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except (OSError, ValueError) as error:
        raise ShearingError(
            "domains",
            value=f"{HUB_PREFIX}{name}",
            allowed="a data set of the Hugging Face hub that can be reached",
            mend=str(error).splitlines()[0],
        ) from error
