"""The tokenizer that a user names, and the token that closes each document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.errors import ShearingError, named, nearest_name
from shearing.models.tokenizer import BeginTokens, begin_tokens, open_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class NamedTokenizer:
    """A fast tokenizer.

    Attributes:
        name: as the user gave it.
        full: as `transformers` has it.
        backend: as `tokenizers` has it; without truncation and padding.
        separator_id: token that closes each document.
        vocab_size: largest token id + 1.
        begin: with which it begins a text.
        notice: what is to be said of it, or None.
    """

    name: str
    full: PreTrainedTokenizerBase
    backend: Tokenizer
    separator_id: int
    vocab_size: int
    begin: BeginTokens
    notice: str | None

    @property
    def begin_id(self) -> int | None:
        """Token that begins a text, whether the tokenizer puts it there or only names it; None: it knows none."""
        return self.begin.named if self.begin.front is None else self.begin.front

    @property
    def fingerprint(self) -> str:
        """See `tokenizer_fingerprint`."""
        return tokenizer_fingerprint(self.backend)


def load_tokenizer(name: str, *, separator_token: str | None) -> NamedTokenizer:
    """Load a tokenizer of Hugging Face.

    Args:
        name: folder or hub name.
        separator_token: token put after each document; None: the tokenizer's end-of-sequence token.

    Raises:
        ShearingError: see `open_tokenizer`; it does not have the separator.
    """
    with named({"source": "tokenizer"}):
        opened = open_tokenizer(name)
    tokenizer, backend = opened.full, opened.backend
    token = separator_token or tokenizer.eos_token
    vocabulary = backend.get_vocab()
    if token is None:
        raise ShearingError(
            "separator_token",
            value=None,
            allowed="a token that ends each document, as this tokenizer names no end-of-sequence token",
            mend="name one of its tokens: --separator-token TOKEN",
        )
    if token not in vocabulary:
        raise ShearingError(
            "separator_token",
            value=token,
            allowed="a token of the vocabulary",
            mend=nearest_name(token, vocabulary) or "name the token that ends a document",
        )
    return NamedTokenizer(
        name=name,
        full=tokenizer,
        backend=backend,
        separator_id=vocabulary[token],
        vocab_size=max(vocabulary.values()) + 1,
        begin=begin_tokens(tokenizer),
        notice=opened.notice,
    )
