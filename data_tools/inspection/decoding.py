"""Text of a corpus again, with the tokenizer that lies in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shearing.data.corpus.format import TOKENIZER_NAME
from shearing.errors import ShearingError
from shearing.files.permissions import forbidden

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def open_tokenizer(corpus: Path) -> Tokenizer | None:
    """The tokenizer of the corpus at a path; None if there is none in it.

    Raises:
        ShearingError: it cannot be read.
    """
    from tokenizers import Tokenizer

    file = corpus / TOKENIZER_NAME
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise forbidden(file, error=error) or ShearingError(
            str(file), value=str(error), allowed="a tokenizer of `tokenizers`", mend="copy tokenizer.json there again"
        ) from error
