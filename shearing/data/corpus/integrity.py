"""What is wrong with the files of a domain, as far as can be told without reading them: done at every start.

Found: files that are missing, truncated, too long, of another kind, or exchanged with those of another domain or split.
Exchanged files are told apart by their sizes, by their document ends (all of them where that takes no time) and by
whether separators are where documents end. Not found: single tokens that changed. `shear data verify` finds those too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shearing.data.corpus.adopted import Adopted, AdoptedFile, AdoptedTokens, ranges_path
from shearing.data.corpus.counted import counted_path
from shearing.data.corpus.format import MANIFEST_NAME, DomainManifest, made_again
from shearing.data.corpus.tokens import FlatTokens, Tokens
from shearing.errors import ShearingError
from shearing.files.mapped_arrays import map_array
from shearing.files.permissions import forbidden

# Document ends up to this size are compared in full with the manifest's checksum.
SMALL_BYTES = 1 << 16
SAMPLED_ENDS = 4


@dataclass(frozen=True)
class Damage:
    """One file that is not what the manifest says.

    Without a `mend` the file is a domain's own, and the domain has to be made again.
    """

    file: str
    found: str
    expected: str
    mend: str | None = None

    @classmethod
    def of(cls, error: ShearingError) -> Damage:
        """What an error about a file says."""
        return cls(error.field, str(error.value), error.allowed, mend=error.mend)

    @classmethod
    def unread(cls, path: Path, error: OSError, *, expected: str) -> Damage:
        """A file that the operating system does not let us read."""
        if no_permission := forbidden(path, error=error):
            return cls.of(no_permission)
        found = f"cannot be read: {error.strerror or error}"
        return cls(str(path), found, expected, mend="look to the disk that it is on: the file may be whole")

    def __str__(self) -> str:
        return f"{self.file}: {self.found}; expected {self.expected}"

    def error(self) -> ShearingError:
        """The same for a user who wanted to do something else."""
        mend = f"the file is damaged: {made_again(Path(self.file).parent)}" if self.mend is None else self.mend
        return ShearingError(self.file, value=self.found, allowed=self.expected, mend=mend)


def open_tokens(folder: Path, *, part: str, manifest: DomainManifest) -> Tokens:
    """The tokens of a part of a domain, own or adopted.

    Raises:
        OSError, ShearingError: a file cannot be opened.
    """
    adopted = Adopted.read(folder)
    if adopted is None:
        return FlatTokens(folder / f"{part}.bin", dtype=manifest.dtype)
    return AdoptedTokens.open(
        folder, part=part, adopted=adopted, separator_id=manifest.separator_id, dtype=manifest.dtype
    )


def quick_damages(folder: Path, *, manifest: DomainManifest) -> Iterator[Damage]:
    """Everything wrong with a domain that can be told in about a millisecond.

    Args:
        folder: of the domain.
        manifest: what it says about itself.
    """
    if manifest.domain != folder.name:
        yield Damage(
            str(folder / MANIFEST_NAME),
            f"the manifest of domain {manifest.domain}",
            f"that of {folder.name}",
            mend=f"files of two domains were exchanged: put them back, or {made_again(folder)}",
        )
        return
    adopted = Adopted.read(folder)
    found_in_files = list(_adopted_damages(adopted)) if adopted else []
    yield from found_in_files
    for part, counts in manifest.parts.items():
        damages = [] if adopted else list(_size_damage(folder, part=part, manifest=manifest))
        damages += _counted_damage(folder, part=part, manifest=manifest)
        ends = _array_or_damage(
            folder / f"{part}_ends.npy", dtype=np.int64, size=counts.documents, sha256=counts.ends_sha256
        )
        hashes = _array_or_damage(
            folder / f"{part}_hashes.npy", dtype=np.uint64, size=counts.documents, sha256=counts.hashes_sha256
        )
        damages += [each for each in (ends, hashes) if isinstance(each, Damage)]
        if adopted is not None:
            damages += _ranges_damage(ranges_path(folder, part), tokens=counts.tokens, files=len(adopted.files))
        if not isinstance(ends, Damage):
            if len(ends) and int(ends[-1]) != counts.tokens:
                file = folder / f"{part}_ends.npy"
                damages.append(
                    Damage(str(file), f"a last document that ends at {ends[-1]}", f"an end at token {counts.tokens}")
                )
            elif not damages and not found_in_files and (adopted is None or adopted.separators != "inside"):
                damages += _separator_damage(folder, part=part, manifest=manifest, adopted=adopted, ends=ends)
        yield from damages


def _size_damage(folder: Path, *, part: str, manifest: DomainManifest) -> Iterator[Damage]:
    file = folder / f"{part}.bin"
    expected = manifest.parts[part].tokens * np.dtype(manifest.dtype).itemsize
    found = file.stat().st_size if file.is_file() else None
    if found != expected:
        yield Damage(
            str(file),
            "missing" if found is None else f"{found} bytes",
            f"{expected} bytes, as the manifest says",
        )


def _counted_damage(folder: Path, *, part: str, manifest: DomainManifest) -> Iterator[Damage]:
    counts = manifest.parts[part]
    if counts.counted is None:
        return
    file = counted_path(folder, part)
    expected = -(-counts.tokens // 8)
    found = file.stat().st_size if file.is_file() else None
    if found != expected:
        value = "missing" if found is None else f"{found} bytes"
        yield Damage(str(file), value, f"{expected} bytes, a bit for each token")


def _adopted_damages(adopted: Adopted) -> Iterator[Damage]:
    for file in adopted.files:
        yield from _file_damage(file)


def _file_damage(file: AdoptedFile) -> Iterator[Damage]:
    path = Path(file.path)
    if not path.is_file():
        yield Damage(file.path, "missing", "the file that was adopted", mend="put it back, or adopt the domain again")
        return
    status = path.stat()
    if status.st_size != file.bytes:
        yield Damage(
            file.path,
            f"{status.st_size} bytes",
            f"{file.bytes} bytes, as when it was adopted",
            mend="put back the file that was adopted, or adopt the domain again",
        )
    elif status.st_mtime_ns != file.mtime_ns:
        seconds, rest = divmod(file.mtime_ns, 10**9)
        yield Damage(
            file.path,
            "written to or exchanged since it was adopted",
            "the file that was adopted",
            mend="adopt the domain again; if `shear data verify --sources` finds nothing else wrong, "
            f"`touch -d @{seconds}.{rest:09d} {file.path}` will do",
        )


def _array_or_damage(path: Path, *, dtype: type[Any], size: int, sha256: str) -> npt.NDArray[Any] | Damage:
    """The array of a file; read and compared in full if it is small, mapped if not."""
    num_bytes = size * np.dtype(dtype).itemsize
    content = b""
    with contextlib.suppress(OSError):
        # Slightly larger than its numbers, for the header.
        if num_bytes < path.stat().st_size <= SMALL_BYTES:
            content = path.read_bytes()
    if content and hashlib.sha256(content).hexdigest() == sha256:
        return np.frombuffer(content, dtype=dtype, count=size, offset=len(content) - num_bytes)
    array = _open_array(path)
    if isinstance(array, Damage):
        return array
    if array.dtype != dtype or array.shape != (size,):
        return Damage(
            str(path),
            f"{array.dtype} {list(array.shape)}",
            f"{np.dtype(dtype)} [{size}], a number for each document of the manifest",
        )
    if content:
        return Damage(
            str(path),
            "other content than when it was written",
            f"a file with SHA-256 {sha256}",
            mend=f"the file is damaged, or was exchanged with another domain's: {made_again(path.parent)}",
        )
    return array


def _ranges_damage(path: Path, *, tokens: int, files: int) -> Iterator[Damage]:
    array = _open_array(path)
    if isinstance(array, Damage):
        yield array
    elif array.dtype != np.int64 or array.ndim != 2 or len(array) != 3:
        yield Damage(str(path), f"{array.dtype} {list(array.shape)}", "int64 [3, ranges]")
    elif array.shape[1] and (int(array[0, -1]) != tokens or not 0 <= int(array[1, -1]) < files):
        yield Damage(str(path), f"ranges up to token {array[0, -1]}", f"an end at token {tokens}")


def _open_array(path: Path) -> npt.NDArray[Any] | Damage:
    try:
        return map_array(path)
    except FileNotFoundError:
        return Damage(str(path), "missing", "a file of a prepared domain")
    except OSError as error:
        return Damage.unread(path, error, expected="a whole .npy file")
    except ValueError as error:
        return Damage(str(path), str(error), "a whole .npy file")


def _separator_damage(
    folder: Path, *, part: str, manifest: DomainManifest, adopted: Adopted | None, ends: npt.NDArray[Any]
) -> Iterator[Damage]:
    """Whether a few documents, first and last included, end in the separator."""
    file = folder / f"{part}.bin" if adopted is None else ranges_path(folder, part)
    chosen = sorted({i * (len(ends) - 1) // (SAMPLED_ENDS - 1) for i in range(SAMPLED_ENDS)}) if len(ends) else []
    last_tokens = [int(ends[index]) - 1 for index in chosen]
    if any(not 0 <= position < manifest.parts[part].tokens for position in last_tokens):
        yield Damage(str(folder / f"{part}_ends.npy"), "ends outside of the tokens", "ends that rise to the last token")
        return
    try:
        if adopted is None:
            found = _tokens_at(file, last_tokens, dtype=manifest.dtype)
        else:
            tokens = open_tokens(folder, part=part, manifest=manifest)
            found = [int(tokens.read(position, position + 1)[0]) for position in last_tokens]
    except OSError as error:
        yield Damage.unread(Path(error.filename or file), error, expected="tokens that can be read")
        return
    except (IndexError, ValueError):
        if adopted is None:
            raise
        yield Damage(str(file), "ranges that lie outside of their files", "ranges inside of them")
        return
    for index, position, token in zip(chosen, last_tokens, found, strict=True):
        if token != manifest.separator_id:
            yield Damage(
                str(file),
                f"no separator where document {index} ends, at token {position + 1}",
                f"token {manifest.separator_id} there",
                mend="tokens and document ends are of different texts: the file was damaged or exchanged with "
                f"another's; {made_again(folder)}",
            )
            return


def _tokens_at(path: Path, positions: Sequence[int], *, dtype: str) -> list[int]:
    """Single tokens of a file, without mapping it: of a thousand domains, a batch may need a few."""
    kind = np.dtype(dtype)
    with path.open("rb", buffering=0) as file:
        return [
            int(np.frombuffer(os.pread(file.fileno(), kind.itemsize, position * kind.itemsize), dtype=kind)[0])
            for position in positions
        ]
