"""A shard: what one task of a preparation leaves, tokens and documents in order, not yet divided into splits.

SHARD/tokens.bin       flat tokens, each document closed by the separator
SHARD/documents.bin    of each document its tokens, bytes of text and hash: `DOCUMENT`
SHARD/counted.bin      one byte for each token, 1 if it counts in a loss; only where some do not
SHARD/shard.json       counts, written last
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shearing.data.corpus.format import SourceFile, text_hash
from shearing.errors import ShearingError
from shearing.files.durable import write_json

DOCUMENT = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("hash", "<u8")])
DOCUMENTS_PER_READ = 1 << 17
TOKENS_NAME, DOCUMENTS_NAME, COUNTS_NAME = "tokens.bin", "documents.bin", "shard.json"
COUNTED_NAME = "counted.bin"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where it holds every token id, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class Shard:
    """A finished shard.

    Args:
        left_out: documents that were read and are not in here, by reason.
        sources: what was read for it, with checksums.
        counted: whether it says of each token if it counts in a loss.
    """

    folder: Path
    documents: int
    tokens: int
    largest_token: int
    left_out: Mapping[str, int]
    sources: tuple[SourceFile, ...]
    counted: bool = False

    @classmethod
    def open(cls, folder: Path) -> Shard:
        values = json.loads((folder / COUNTS_NAME).read_text(encoding="utf-8"))
        sources = tuple(SourceFile(**source) for source in values.pop("sources"))
        return cls(folder=folder, sources=sources, **values)

    def read_documents(self) -> Iterator[npt.NDArray[Any]]:
        """Of each document its tokens, bytes and hash, a part at a time; `DOCUMENT` [documents of the part]."""
        with (self.folder / DOCUMENTS_NAME).open("rb") as file:
            while len(part := np.fromfile(file, dtype=DOCUMENT, count=DOCUMENTS_PER_READ)):
                yield part

    def read_tokens(self, start: int, stop: int, *, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Tokens [start, stop); read and not mapped, as pages of a mapping stay in memory while there is room."""
        place = self.folder / TOKENS_NAME
        return np.fromfile(place, dtype=dtype, count=stop - start, offset=start * dtype.itemsize)

    def read_counted(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Of tokens [start, stop) whether they count in a loss."""
        return np.fromfile(self.folder / COUNTED_NAME, dtype=np.bool_, count=stop - start, offset=start)


class ShardWriter:
    """Writes a shard into an existing folder; memory does not grow with its length.

    Args:
        folder: of the shard.
        vocab_size, separator_id: see `CorpusWriter`.
        begin_id: token put in front of every document that does not begin with it, as what a chat template writes may;
            or None.
        counted: whether it is said of each token if it counts in a loss.
    """

    def __init__(
        self, folder: Path, *, vocab_size: int, separator_id: int, begin_id: int | None = None, counted: bool = False
    ) -> None:
        self.folder = folder
        self.begin_id = begin_id
        self.vocab_size = vocab_size
        self.separator_id = separator_id
        self.dtype = token_dtype(vocab_size)
        self.documents = self.tokens = self.bytes = self.largest_token = 0
        self._tokens = (folder / TOKENS_NAME).open("wb")
        self._documents = (folder / DOCUMENTS_NAME).open("wb")
        self._counted = (folder / COUNTED_NAME).open("wb") if counted else None

    def add(
        self,
        texts: Sequence[bytes],
        *,
        token_ids: Iterable[Sequence[int]],
        counted: Iterable[npt.NDArray[np.bool_]] | None = None,
    ) -> None:
        """Append documents; the tokens in front of them and behind them are added here.

        Args:
            texts: UTF-8.
            token_ids: of each text.
            counted: of each text which of its tokens count in a loss; the separator does if the token before it does.

        Raises:
            ShearingError: a token id is negative or not below the vocabulary size.
        """
        flat, ends = array("q"), []
        fronts: list[int] = []
        for ids in token_ids:
            front = [] if self.begin_id is None or (len(ids) and ids[0] == self.begin_id) else [self.begin_id]
            fronts.append(len(front))
            flat.fromlist(front)
            flat.fromlist(list(ids))
            flat.append(self.separator_id)
            ends.append(len(flat))
        tokens = np.frombuffer(flat, dtype=np.int64)
        records = np.empty(len(texts), dtype=DOCUMENT)
        records["tokens"] = np.diff(ends, prepend=0)
        records["bytes"] = [len(text) for text in texts]
        records["hash"] = np.array([text_hash(text) for text in texts], dtype=np.uint64)
        if not len(tokens):
            return
        smallest, largest = int(tokens.min()), int(tokens.max())
        if largest >= self.vocab_size or smallest < 0:
            raise ShearingError(
                "token id",
                value=largest if largest >= self.vocab_size else smallest,
                allowed=f"0 to {self.vocab_size - 1}",
                mend="use the tokenizer whose vocabulary size was given",
            )
        self._tokens.write(tokens.astype(self.dtype).tobytes())
        self._documents.write(records.tobytes())
        if self._counted is not None:
            assert counted is not None
            for of_text, before in zip(counted, fronts, strict=True):
                bits = np.zeros(before + len(of_text) + 1, dtype=np.bool_)
                bits[before:-1] = of_text
                bits[-1] = len(of_text) > 0 and of_text[-1]
                self._counted.write(bits.tobytes())
        self.documents += len(texts)
        self.tokens += len(tokens)
        self.bytes += int(records["bytes"].sum())
        self.largest_token = max(self.largest_token, largest)

    def close(self, *, sources: Sequence[SourceFile], left_out: Mapping[str, int]) -> Shard:
        """Flush everything to disk and write the counts."""
        for file in (self._tokens, self._documents, *([] if self._counted is None else [self._counted])):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        counts = {
            "documents": self.documents,
            "tokens": self.tokens,
            "largest_token": self.largest_token,
            "left_out": dict(sorted(left_out.items())),
            "sources": [asdict(source) for source in sources],
            "counted": self._counted is not None,
        }
        write_json(self.folder / COUNTS_NAME, counts)
        return Shard.open(self.folder)

    def abandon(self) -> None:
        """Close the files; what was written is of no use."""
        for file in (self._tokens, self._documents, *([] if self._counted is None else [self._counted])):
            file.close()
