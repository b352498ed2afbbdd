"""What a file of text is, by its name."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Literal

Kind = Literal["lines", "json", "parquet", "arrow", "text"]
Compression = Literal["gzip", "zstd"]

KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
COMPRESSED: tuple[Kind, ...] = ("lines", "json", "text")
ENDINGS = f"{', '.join(KINDS)}; JSON and text also with {' or '.join(COMPRESSIONS)}"


def kind_of(path: str) -> tuple[Kind, Compression | None] | None:
    """How a file is read, by its name, in capitals or not; None if it is not."""
    name = PurePosixPath(path.partition("?")[0]) if "://" in path else PurePosixPath(path)
    compression = COMPRESSIONS.get(name.suffix.lower())
    kind = KINDS.get((name.with_suffix("") if compression else name).suffix.lower())
    if kind is None or (compression and kind not in COMPRESSED):
        return None
    return kind, compression


def packages_of(kind: Kind, *, compression: Compression | None) -> list[str]:
    """Packages of the extra `data` that reading such a file needs."""
    by_kind = {"lines": ["orjson"], "json": ["orjson"], "parquet": ["pyarrow"], "arrow": ["pyarrow"], "text": []}
    return [*by_kind[kind], *(["zstandard"] if compression == "zstd" else [])]
