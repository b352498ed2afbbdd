"""Texts that nobody prepared, to tokens: in preparation and calibration alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from shearing.errors import ShearingError


class Encoded(NamedTuple):
    """Tokens of a document, and of each whether it counts in the loss, bool [tokens]; None: all do."""

    ids: list[int]
    counted: npt.NDArray[np.bool_] | None = None


class PlainTokenizer:
    """A tokenizer that adds and cuts nothing.

    Args:
        tokenizer_json: content of a tokenizer.json.
        special_tokens: whether `</s>` in a text is the token of that name; if not, it is four letters.
    """

    def __init__(self, tokenizer_json: str, *, special_tokens: bool = False) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        # A limit left by an earlier use of the tokenizer would cut documents short.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A separator spelled out in a text must not divide it.
        self._tokenizer.encode_special_tokens = not special_tokens

    @classmethod
    def of(cls, tokenizer: Any) -> PlainTokenizer:
        """The same tokenizer as one of `transformers`.

        Raises:
            ShearingError: it is no fast one.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ShearingError(
                "tokenizer",
                value=getattr(tokenizer, "name_or_path", type(tokenizer).__name__),
                allowed="a fast tokenizer (with a tokenizer.json)",
                mend="choose another",
            )
        return cls(backend.to_str())

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokens of each text, on all cores that `RAYON_NUM_THREADS` allows."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [Encoded(encoding.ids) for encoding in encodings]
