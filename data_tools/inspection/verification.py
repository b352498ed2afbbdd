"""Whether a corpus is what its manifests say, every byte of it: `shear data verify`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from data_tools.inspection.decoding import open_tokenizer
from shearing.data.corpus.adopted import Adopted
from shearing.data.corpus.counted import counted_path
from shearing.data.corpus.format import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    DomainManifest,
    read_index,
    tokenizer_fingerprint,
)
from shearing.data.corpus.integrity import Damage, open_tokens, quick_damages
from shearing.errors import ShearingError, named
from shearing.files.checksums import Advance, sha256_of_file
from shearing.files.mapped_arrays import map_array
from shearing.progress import activity

if TYPE_CHECKING:
    from tokenizers import Tokenizer


TOKENS_AT_A_TIME = 1 << 20
DECODED_TOKENS = 64


@dataclass
class Verification:
    """What was looked at, and what is wrong with it; `unchecked` are sources that cannot be compared from here."""

    domains: list[str]
    damages: list[Damage] = field(default_factory=list)
    bytes_read: int = 0
    rows_decoded: int = 0
    sources: int = 0
    unchecked: list[str] = field(default_factory=list)


@named({"corpus": "CORPUS"})
def verify(path: Path, *, sources: bool, rows: int, seed: int, console: Console) -> Verification:
    """Read all of a corpus and compare it with its manifests.

    Args:
        path: the corpus.
        sources: read the files that it was made from too.
        rows: pieces of text decoded from each part of each domain, where the tokenizer is in the corpus.
        seed: chooses them.

    Raises:
        ShearingError: there is no corpus at `path`.
    """
    index = read_index(path)
    result = Verification(domains=list(index["domains"]))
    manifests = {
        name: manifest
        for name in result.domains
        if (manifest := _manifest(path / name, fingerprint=index["tokenizer_fingerprint"], result=result))
    }
    tokenizer = _tokenizer(path, fingerprint=index["tokenizer_fingerprint"], result=result)
    total = sum(_size(path / name, manifest) for name, manifest in manifests.items())
    if sources:
        total += sum(source.bytes for manifest in manifests.values() for source in manifest.sources)
    generator = np.random.default_rng(seed)
    with activity("verify", total=max(1, total), console=console) as advance:
        for name, manifest in manifests.items():
            for part in manifest.parts:
                check = _Part(path / name, part=part, manifest=manifest)
                result.damages += check.damages(advance)
                result.bytes_read += check.bytes_read
                if tokenizer is not None and not check.unreadable:
                    result.damages += check.decode(tokenizer, rows=rows, generator=generator)
                    result.rows_decoded += rows
            if sources:
                _check_sources(manifest, result=result, advance=advance)
    # The first that was found says most: a truncated file has another checksum too.
    result.damages = list({damage.file: damage for damage in reversed(result.damages)}.values())[::-1]
    return result


def render(result: Verification) -> Text:
    """The result in words."""
    text = Text()
    for damage in result.damages:
        text.append(f"{damage.file}\n", style="bold red")
        text.append(f"  found: {damage.found}\n  expected: {damage.expected}\n  to mend: {damage.mend}\n")
    domains = len(result.domains)
    read = f"{domains} {'domain' if domains == 1 else 'domains'}, {result.bytes_read / 1e6:,.1f} MB read"
    read += f", {result.rows_decoded} pieces decoded" if result.rows_decoded else ", nothing decoded"
    read += f", {result.sources} sources compared" if result.sources else ""
    if result.unchecked:
        read += f"; {len(result.unchecked)} sources are not here to be compared, as {result.unchecked[0]}"
    count = len(result.damages)
    text.append(
        f"{read}: " + (f"{count} {'file is' if count == 1 else 'files are'} not in order" if count else "nothing wrong")
    )
    return text


def _manifest(folder: Path, *, fingerprint: str, result: Verification) -> DomainManifest | None:
    try:
        manifest = DomainManifest.read(folder)
        result.damages += quick_damages(folder, manifest=manifest)
    except ShearingError as error:
        result.damages.append(Damage.of(error))
        return None
    if manifest.tokenizer_fingerprint != fingerprint:
        result.damages.append(Damage(str(folder / MANIFEST_NAME), "another tokenizer", "that of the other domains"))
    # Against another domain's manifest every file would be wrong.
    return manifest if manifest.domain == folder.name else None


def _size(folder: Path, manifest: DomainManifest) -> int:
    own = manifest.tokens * np.dtype(manifest.dtype).itemsize
    return own + sum(file.stat().st_size for pattern in ("*.npy", "*_counted.bin") for file in folder.glob(pattern))


def _tokenizer(path: Path, *, fingerprint: str, result: Verification) -> Tokenizer | None:
    file = path / TOKENIZER_NAME
    try:
        tokenizer = open_tokenizer(path)
    except ShearingError as error:
        result.damages.append(Damage.of(error))
        return None
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != fingerprint:
        result.damages.append(
            Damage(
                str(file),
                "another tokenizer than the one that made the tokens",
                f"one of fingerprint {fingerprint}",
                mend="put the right one back",
            )
        )
        return None
    return tokenizer


class _Part:
    """The files of one part of one domain."""

    def __init__(self, folder: Path, *, part: str, manifest: DomainManifest) -> None:
        self.folder, self.part, self.manifest = folder, part, manifest
        self.counts = manifest.parts[part]
        self.bytes_read = 0
        self.unreadable = False

    def damages(self, advance: Advance) -> Iterator[Damage]:
        """Compare all files with the manifest."""
        file = self.folder / f"{self.part}.bin"
        if not file.exists():
            file = self.folder / f"{self.part}_ranges.npy"
        try:
            tokens = open_tokens(self.folder, part=self.part, manifest=self.manifest)
            ends = map_array(self.folder / f"{self.part}_ends.npy")
        except (FileNotFoundError, ValueError):
            self.unreadable = True  # which the quick checks have told
        except OSError as error:
            self.unreadable = True  # they have, if they came so far
            yield Damage.unread(Path(error.filename or file), error, expected="a file that can be read")
        else:
            if ends.dtype == np.int64:
                yield from self._end_damages(ends)
                yield from self._token_damages(file, tokens=tokens, ends=ends, advance=advance)
        files = {
            self.folder / f"{self.part}_ends.npy": self.counts.ends_sha256,
            self.folder / f"{self.part}_hashes.npy": self.counts.hashes_sha256,
        }
        if self.counts.counted_sha256 is not None:
            files[counted_path(self.folder, self.part)] = self.counts.counted_sha256
        for file, sha256 in files.items():
            yield from self._sum_damage(file, sha256, advance=advance)

    def _sum_damage(self, file: Path, sha256: str, *, advance: Advance) -> Iterator[Damage]:
        expected = f"a file with SHA-256 {sha256}"
        try:
            self.bytes_read += file.stat().st_size
            if sha256_of_file(file, advance=advance) != sha256:
                yield Damage(str(file), "other content than when it was written", expected)
        except FileNotFoundError:
            return  # which the quick checks have told
        except OSError as error:
            yield Damage.unread(file, error, expected=expected)

    def _end_damages(self, ends: Any) -> Iterator[Damage]:
        file = str(self.folder / f"{self.part}_ends.npy")
        before = 0
        for start in range(0, len(ends), TOKENS_AT_A_TIME):
            chunk = ends[start : start + TOKENS_AT_A_TIME]
            falls = np.flatnonzero(np.diff(chunk, prepend=before) <= 0)
            if len(falls):
                index = int(falls[0])
                yield Damage(
                    file,
                    f"document {start + index} ends at token {chunk[index]}, not after the one before it",
                    "ends that rise",
                )
                return
            before = int(chunk[-1])
        if before != self.counts.tokens:
            yield Damage(file, f"a last document that ends at {before}", f"an end at token {self.counts.tokens}")

    def _token_damages(self, file: Path, *, tokens: Any, ends: Any, advance: Advance) -> Iterator[Damage]:
        """SHA-256 of the tokens, ids inside the vocabulary, separators where documents end."""
        manifest, adopted = self.manifest, Adopted.read(self.folder)
        digest = hashlib.sha256()
        largest, missing, next_end = 0, None, 0
        for start in range(0, len(tokens), TOKENS_AT_A_TIME):
            try:
                chunk = tokens.read(start, start + TOKENS_AT_A_TIME)
            except (IndexError, ValueError):
                self.unreadable = True
                yield Damage(str(file), "ranges that lie outside of their files", "ranges inside of them")
                return
            digest.update(chunk.astype(manifest.dtype).tobytes())
            largest = max(largest, int(chunk.max()))
            last_end = int(np.searchsorted(ends, start + len(chunk), side="right"))
            closing = chunk[np.clip(ends[next_end:last_end] - 1 - start, 0, len(chunk) - 1)]
            [unclosed] = np.nonzero(closing != manifest.separator_id)
            if missing is None and len(unclosed):
                missing = next_end + int(unclosed[0])
            next_end = max(next_end, last_end)
            num_bytes = len(chunk) * np.dtype(manifest.dtype).itemsize
            self.bytes_read += num_bytes
            advance(num_bytes)
        if largest >= manifest.vocab_size:
            yield Damage(str(file), f"token id {largest}", f"ids below {manifest.vocab_size}")
        if missing is not None and (adopted is None or adopted.separators != "inside"):
            yield Damage(
                str(file),
                f"no separator where document {missing} ends, at token {int(ends[missing])}",
                f"token {manifest.separator_id} there",
            )
        if digest.hexdigest() != self.counts.sha256:
            yield Damage(str(file), "other tokens than when it was written", f"SHA-256 {self.counts.sha256}")

    def decode(self, tokenizer: Tokenizer, *, rows: int, generator: np.random.Generator) -> Iterator[Damage]:
        """Decode a few tokens from random places; text has to come out."""
        tokens = open_tokens(self.folder, part=self.part, manifest=self.manifest)
        for _ in range(rows):
            start = int(generator.integers(0, max(1, len(tokens) - DECODED_TOKENS)))
            piece = tokens.read(start, start + DECODED_TOKENS)
            text_ids = [int(token) for token in piece if token != self.manifest.separator_id]
            try:
                text = tokenizer.decode(text_ids, skip_special_tokens=False)
            except (OverflowError, ValueError, TypeError) as error:
                text = f"({error})"
            else:
                if text or not text_ids:
                    continue
            yield Damage(
                str(self.folder / f"{self.part}.bin"),
                f"tokens {start} to {start + len(piece)} decode to nothing {text}".rstrip(),
                "text",
            )
            return


def _check_sources(manifest: DomainManifest, *, result: Verification, advance: Advance) -> None:
    for source in manifest.sources:
        kind, _, checksum = source.checksum.partition(":")
        if kind != "sha256":
            result.unchecked.append(source.path)
            continue
        result.sources += 1
        path, expected = Path(source.path), f"a source of domain {manifest.domain}"
        try:
            if not path.is_file():
                result.damages.append(Damage(source.path, "missing", expected))
            elif path.stat().st_size != source.bytes:
                result.damages.append(Damage(source.path, f"{path.stat().st_size} bytes", f"{source.bytes} bytes"))
            elif sha256_of_file(path, advance=advance) != checksum:
                result.damages.append(Damage(source.path, "other content than when it was read", f"SHA-256 {checksum}"))
        except OSError as error:
            result.damages.append(Damage.unread(path, error, expected=expected))
