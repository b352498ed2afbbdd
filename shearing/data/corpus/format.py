"""What a tokenised corpus is on disk: names of its files, their index and manifests, and the tokenizer it is of."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from shearing.data.corpus.bos import Bos, BosMode
from shearing.errors import ShearingError
from shearing.files.permissions import forbidden

HeldOutSplit = Literal["validation", "test"]
"""validation: what steers a run and what constants are chosen on; test: what judges."""
Split = Literal["train", HeldOutSplit]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT: tuple[HeldOutSplit, ...] = ("validation", "test")
FORMAT = 3
READABLE_FORMATS = (2, 3)
ONE_PART = "heldout"
"""Of format 2: all that was held out of a domain, one part for both purposes."""
INDEX_NAME = "corpus.json"
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

# What a preparation leaves that was interrupted: domains, or its work.
_BEGUN = (f"*/{MANIFEST_NAME}", ".preparing-*", ".partial-*")

# Texts on which tokenizers that share a vocabulary still differ: digits, runs of spaces, case, accents, symbols.
PROBES = (
    "In 1887, 12345 people paid $3.50 each; it's 100% true.",
    "def area(r):\n    return 3.14159 * r ** 2  # \t tabs\n\n",
    "Être naïve à Zürich, 東京 or Москва? 🙂 <|endoftext|>",
)


class Tokenizer(Protocol):
    """What a fingerprint needs; both `transformers` and `tokenizers` objects have it."""

    def get_vocab(self) -> dict[str, int]: ...

    def encode(self, text: str, /, *, add_special_tokens: bool) -> Any: ...


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of the vocabulary and of how the tokenizer splits a few probes (hexadecimal, 32 digits).

    It does not depend on how a library version writes its files, and it does notice another pre-tokeniser.
    """
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode(errors="surrogatepass"))
    for probe in PROBES:
        encoded = tokenizer.encode(probe, add_special_tokens=False)
        digest.update(json.dumps([int(i) for i in getattr(encoded, "ids", encoded)]).encode())
    return digest.hexdigest()[:32]


def text_hash(text: bytes) -> int:
    """What a text is known by: BLAKE2b of its UTF-8 bytes, the first 8 as a big-endian number."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@dataclass(frozen=True)
class SourceFile:
    """Something that a domain was made of.

    Args:
        path: of a file, absolute, or its URL; or a description of what is no file.
        bytes: its size.
        checksum: "sha256:…" of its bytes, or "etag:…" as the store gives it; empty for what is no file.
    """

    path: str
    bytes: int = 0
    checksum: str = ""


@dataclass(frozen=True)
class SplitManifest:
    """Counts of one part of one domain; `bytes` is UTF-8 text without separators, checksums are of its files.

    `counted` is how many tokens count in a loss, and `counted_sha256` of the file that says which; None: all do, and
    there is no such file.
    """

    documents: int
    tokens: int
    bytes: int
    sha256: str
    ends_sha256: str
    hashes_sha256: str
    counted: int | None = None
    counted_sha256: str | None = None


@dataclass(frozen=True)
class DomainManifest:
    """What a domain folder says about itself.

    Args:
        parts: what lies on disk under each name: the splits; in format 2 `train` and `heldout`.
        sources: what it was made of, in the order in which the documents lie on disk.
        split_seed: with the documents' hashes it decides what is held out.
        sizes: of the held-out parts, as asked for: "5%" of the tokens or "2000000 tokens".
        duplicates: documents in here whose text another document of the domain has too, the first of each not counted.
        left_out: documents that are not in here, by reason.
        versions: of the packages that made it.
        inputs: identifies sources and settings, so that the same preparation is not done twice.
        bos_mode, bos_id: how its texts begin, see `Bos`; manifests of earlier versions say nothing: without a token.
    """

    domain: str
    parts: dict[str, SplitManifest]
    dtype: str
    vocab_size: int
    largest_token: int
    separator_id: int
    tokenizer: str
    tokenizer_fingerprint: str
    sources: tuple[SourceFile, ...]
    split_seed: int
    sizes: dict[str, str]
    duplicates: int
    left_out: dict[str, int]
    versions: dict[str, str]
    inputs: str
    bos_mode: BosMode = "none"
    bos_id: int | None = None

    @classmethod
    def read(cls, folder: Path) -> DomainManifest:
        """Read `folder/manifest.json`.

        Raises:
            ShearingError: it is missing or unreadable.
        """
        path = folder / MANIFEST_NAME
        try:
            values = json.loads(path.read_text())
            if ONE_PART in values:
                values["parts"] = {name: values.pop(name) for name in ("train", ONE_PART)}
                values["sizes"] = {ONE_PART: values.pop("heldout_size")}
            values["parts"] = {name: SplitManifest(**counts) for name, counts in values["parts"].items()}
            if set(values["parts"]) not in (set(SPLITS), {"train", ONE_PART}):
                raise ValueError(f"parts {', '.join(values['parts'])}")
            values["sources"] = tuple(SourceFile(**source) for source in values["sources"])
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise forbidden(path, error=error) or ShearingError(
                str(path),
                value=str(error),
                allowed="the manifest of a prepared domain",
                mend=made_again(folder),
            ) from error

    def to_json(self) -> dict[str, Any]:
        """What `read` reads; without what is None, which earlier versions do not know."""
        values = asdict(self)
        for part in values["parts"].values():
            for name in [name for name, value in part.items() if value is None]:
                del part[name]
        return values

    @property
    def bos(self) -> Bos:
        """How texts begin."""
        return Bos(self.bos_mode, self.bos_id)

    @property
    def train(self) -> SplitManifest:
        """What is trained on."""
        return self.parts["train"]

    @property
    def documents(self) -> int:
        """Documents of all parts."""
        return sum(part.documents for part in self.parts.values())

    @property
    def tokens(self) -> int:
        """Tokens of all parts, separators included."""
        return sum(part.tokens for part in self.parts.values())

    @property
    def bytes(self) -> int:
        """UTF-8 text of all parts."""
        return sum(part.bytes for part in self.parts.values())


def made_again(domain: Path) -> str:
    """How a domain whose folder is damaged is mended: what has a manifest is never replaced, as runs may depend on it.

    Args:
        domain: its folder.
    """
    command = "type the command that made it (shear data prepare, say) again"
    return f"remove {domain}, then {command}" if domain.is_dir() else command


def read_index(path: Path) -> dict[str, Any]:
    """What `corpus.json` of the corpus at `path` says.

    Raises:
        ShearingError: it is missing, unreadable or of another format.
    """
    prepare = "shear data prepare, or python -m data_tools.demo for the demo's text"
    if not path.is_dir():
        raise ShearingError("corpus", value=str(path), allowed="a prepared corpus", mend=f"prepare it: {prepare}")
    try:
        index: dict[str, Any] = json.loads((path / INDEX_NAME).read_text())
    except FileNotFoundError as error:
        if begun := any(found for pattern in _BEGUN for found in path.glob(pattern)):
            mend = f"run the preparation again, it continues where it was: {prepare}"
        else:
            mend = f"prepare it: shear data prepare --domain NAME={path} --tokenizer MODEL -o CORPUS"
        raise ShearingError(
            "corpus",
            value=str(path),
            allowed=("a corpus whose preparation was finished" if begun else "a prepared corpus")
            + f"; there is no {INDEX_NAME} in this folder",
            mend=mend,
        ) from error
    except (OSError, ValueError) as error:
        raise forbidden(path / INDEX_NAME, error=error) or ShearingError(
            str(path / INDEX_NAME), value=str(error), allowed="the index of a corpus", mend=f"prepare again: {prepare}"
        ) from error
    if index.get("format") not in READABLE_FORMATS:
        raise ShearingError(
            str(path / INDEX_NAME),
            value=f"format {index.get('format')}",
            allowed=f"format {' or '.join(map(str, READABLE_FORMATS))}",
            mend=f"prepare the text again: {prepare}",
        )
    return index


def require_domain_name(name: str) -> None:
    """Check that a name can be a folder's.

    Raises:
        ShearingError: it cannot.
    """
    if not DOMAIN_NAME.fullmatch(name):
        raise ShearingError(
            "domain", value=name, allowed="letters, digits, _, - and .", mend="rename the domain, say my_text"
        )
