"""Texts out of files, with the place of each; what cannot be read is an error with its place, or counted."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from shearing.data.texts.bad_input import BadInput
from shearing.data.texts.documents import Text, TextFile
from shearing.data.texts.json_texts import json_texts
from shearing.data.texts.plain_texts import plain_texts
from shearing.data.texts.streams import DAMAGES, NotCompressedError, decompressed
from shearing.data.texts.tables import arrow_texts, parquet_texts


def read_texts(
    source: TextFile, stream: io.RawIOBase, *, opened: Callable[[], BinaryIO], separator: str | None, bad: BadInput
) -> Iterator[Text]:
    """All documents of a file, in order.

    Args:
        source: what is read.
        stream: its bytes from the beginning, read once; of no use to Parquet.
        opened: the file, anew.
        separator: divides text files; None: a file is one document.
        bad: takes what cannot be read.

    Raises:
        ShearingError: bad input, unless it is to be skipped.
    """
    if source.kind == "parquet":
        yield from parquet_texts(opened, source=source, bad=bad)
        return
    try:
        with contextlib.closing(decompressed(stream, compression=source.compression)) as file:
            if source.kind == "text":
                yield from plain_texts(file, source=source, separator=separator, bad=bad)
            elif source.kind == "arrow":
                yield from arrow_texts(file, source=source, bad=bad)
            else:
                yield from json_texts(file, source=source, bad=bad)
    except NotCompressedError as error:
        bad.damaged(error, place=source.path, mend="it is not compressed with gzip: name it without .gz")
    except DAMAGES as error:
        bad.damaged(error, place=source.path)


def read_local_texts(source: TextFile, *, bad: BadInput) -> Iterator[Text]:
    """All documents of a file of this machine, in order; see `read_texts`.

    Raises:
        OSError: it cannot be opened.
    """
    path = Path(source.path)
    with path.open("rb", buffering=0) as stream:
        yield from read_texts(source, stream, opened=lambda: path.open("rb"), separator=None, bad=bad)
