"""The tokenizer that a user names, and the token that closes each document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.errors import ShearingError, nearest_name

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
    """

    name: str
    full: PreTrainedTokenizerBase
    backend: Tokenizer
    separator_id: int
    vocab_size: int

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
        ShearingError: there is none, it is no fast one, or it does not have the separator.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ShearingError(
            "tokenizer",
            value=name,
            allowed="a folder or hub name of a Hugging Face tokenizer",
            mend=f"correct the name ({str(error).splitlines()[0]})",
        ) from error
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ShearingError(
            "tokenizer", value=name, allowed="a fast tokenizer (with a tokenizer.json)", mend="choose another"
        )
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
    # A limit left by an earlier use of the tokenizer would cut documents short.
    backend.no_truncation()
    backend.no_padding()
    return NamedTokenizer(name, tokenizer, backend, vocabulary[token], max(vocabulary.values()) + 1)
