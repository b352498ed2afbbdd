"""The token that begins a text (`<s>`): where a corpus has it, and whether that is what its model was trained with.

`document`: it lies on disk in front of each document. `row`: it lies nowhere; every row is read with it in front, so a
row at sequence length S holds it and the S tokens [i*S, i*S + S), of which all but the last are inputs and all are
labels. Either way no loss counts how well it is predicted: in front of a document it is certain, and at the head of a
row it is no label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shearing.errors import ShearingError, key

BosMode = Literal["none", "document", "row"]
BosChoice = Literal["auto", "document", "row", "none"]


@dataclass(frozen=True)
class Bos:
    """How texts begin.

    Attributes:
        mode: where the token is.
        token: its id; None with `none`.
    """

    mode: BosMode = "none"
    token: int | None = None

    @property
    def in_row(self) -> int:
        """Tokens that every row has in front of those on disk: 1 or 0."""
        return int(self.mode == "row")

    def identity(self) -> list[object]:
        """What a fingerprint has of it: nothing with `none`, so that those of earlier versions stay."""
        return [] if self.mode == "none" else [self.mode, self.token]

    def __str__(self) -> str:
        if self.mode == "none":
            return "no token in front"
        return f"token {self.token} in front of each {self.mode}"


def resolve_bos(choice: BosChoice, *, front: int | None, named: int | None) -> Bos:
    """What a choice means for a tokenizer.

    Args:
        choice: auto: in front of each document the token that the tokenizer puts in front of a text, or none.
        front: that token, None: it puts none.
        named: what the tokenizer calls its token for the beginning, or None.

    Raises:
        ShearingError: a token is wanted and the tokenizer has none.
    """
    if choice == "none" or (choice == "auto" and front is None):
        return Bos()
    token = front if front is not None else named
    if token is None:
        raise ShearingError(
            "bos",
            value=choice,
            allowed="none or auto: this tokenizer puts no token in front of a text and names no bos_token",
            mend=f"set {key('bos')}=none",
        )
    return Bos("document" if choice == "auto" else choice, token)


def require_bos(found: Bos, *, choice: BosChoice, front: int | None, named: int | None, corpus: str) -> None:
    """Check that a corpus begins its texts as they are to begin.

    Args:
        found: as the corpus has it.
        choice: how they are to; auto: as the model's tokenizer does, where a token in front of each row will do too.
        front, named: see `resolve_bos`.
        corpus: what it is called.

    Raises:
        ShearingError: it does not.
    """
    wanted = resolve_bos(choice, front=front, named=named)
    if found == wanted or (choice == "auto" and wanted.token == found.token and found.mode != "none"):
        return
    reason = "as the model's tokenizer does" if choice == "auto" else f"as {key('bos')}={choice} says"
    again = "prepare the text again with bos=" + ("auto" if choice == "auto" else choice)
    same = (
        f", or set {key('bos')}={found.mode} to take the corpus as it is" if found.token in (None, front, named) else ""
    )
    raise ShearingError("bos", value=f"{corpus}: {found}", allowed=f"{wanted}, {reason}", mend=again + same)
