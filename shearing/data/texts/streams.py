"""Bytes of a file, decompressed: an end inside of compressed data is an error, never the end."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO

from shearing.data.texts.kinds import Compression

if TYPE_CHECKING:
    from typing_extensions import Buffer

READ_BYTES = 1 << 20


class TruncatedError(Exception):
    """The compressed data ends inside a frame, or is none."""


class NotCompressedError(Exception):
    """The file does not begin as compressed data does."""


_GZIP = b"\x1f\x8b"
DAMAGES = (EOFError, zlib.error, gzip.BadGzipFile, TruncatedError)
"""What reading a file raises that is cut off or damaged."""


def decompressed(stream: io.RawIOBase, *, compression: Compression | None) -> BinaryIO:
    """What a file holds, read through a buffer; reading raises one of `DAMAGES` where it is cut off.

    Raises:
        NotCompressedError: it is not compressed with gzip, as its name says.
    """
    buffered = io.BufferedReader(stream, READ_BYTES)
    if compression == "gzip":
        if not _GZIP.startswith(first := buffered.peek(len(_GZIP))[: len(_GZIP)]):
            raise NotCompressedError(f"Not a gzipped file ({first!r})")
        return gzip.GzipFile(fileobj=buffered)  # type: ignore[return-value]
    if compression == "zstd":
        return io.BufferedReader(_ZstdStream(buffered), READ_BYTES)
    return buffered


class _ZstdStream(io.RawIOBase):
    """Frames of zstd one after the other; unlike zstandard's own reader it notices an end inside a frame."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        super().__init__()
        self._file = file
        self._new = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._frame: Any = None
        self._error = zstandard.ZstdError
        self._ready = memoryview(b"")
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        while not self._ready:
            if not self._input:
                self._input = self._file.read(1 << 16)
                if not self._input:
                    if self._frame is not None:
                        raise TruncatedError("the compressed data ends too early")
                    return 0
            if self._frame is None:
                self._frame = self._new()
            try:
                self._ready = memoryview(self._frame.decompress(self._input))
            except self._error as error:
                raise TruncatedError(str(error)) from error
            self._input = b""
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = None
        view = memoryview(buffer)
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
