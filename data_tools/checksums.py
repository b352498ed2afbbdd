"""SHA-256 of tokens, wherever they lie, with progress."""

from __future__ import annotations

import hashlib

from shearing.data.corpus.tokens import Tokens
from shearing.files.checksums import Advance

TOKENS_AT_A_TIME = 1 << 20


def sha256_of_tokens(tokens: Tokens, *, dtype: str, advance: Advance = lambda _: None) -> str:
    """SHA-256 of what a file with all these tokens as `dtype` would hold, hexadecimal.

    Args:
        advance: called with the number of bytes just read.
    """
    digest = hashlib.sha256()
    for start in range(0, len(tokens), TOKENS_AT_A_TIME):
        chunk = tokens.read(start, start + TOKENS_AT_A_TIME).astype(dtype)
        digest.update(chunk.tobytes())
        advance(chunk.nbytes)
    return digest.hexdigest()
