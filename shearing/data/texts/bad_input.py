"""What to do with what cannot be read: an error that names its place, or a count."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from shearing.errors import ShearingError, key


@dataclass
class BadInput:
    """What to do with what cannot be read, and how much of it there was.

    Args:
        policy: stop: raise; skip: count.
        max_document_bytes: longer documents count as bad.
        otherwise: how such input is left out, after a mend; empty where it cannot be.
        left_out: documents not taken, by reason; a file that ends too early counts as one.
    """

    policy: Literal["stop", "skip"]
    max_document_bytes: int
    otherwise: str = ""
    left_out: Counter[str] = field(default_factory=Counter)

    def report(self, reason: str, *, place: str, value: str, allowed: str, mend: str) -> None:
        """Raise or count, by the policy.

        Raises:
            ShearingError: the policy is to stop.
        """
        if self.policy == "stop":
            raise ShearingError(place, value=value, allowed=allowed, mend=mend + self.otherwise)
        self.left_out[reason] += 1

    def too_long(self, *, place: str) -> None:
        self.report(
            "too_long",
            place=place,
            value=f"more than {self.max_document_bytes} bytes",
            allowed=f"documents of at most {self.max_document_bytes} bytes",
            mend="divide the document" + (", or raise max_document_bytes" if self.otherwise else ""),
        )

    def not_utf8(self, error: UnicodeDecodeError, *, place: str) -> None:
        self.report(
            "not_utf8",
            place=place,
            value=f"byte {error.object[error.start]:#04x} at offset {error.start}",
            allowed="UTF-8 text",
            mend="convert it to UTF-8",
        )

    def no_text(self, *, place: str, text_field: str, found: str, what: str = "text", mend: str | None = None) -> None:
        self.report(
            "no_text",
            place=place,
            value=found,
            allowed=f"{what} in the field {text_field!r}",
            mend=mend or f"name the field that holds the {what}: {key('text_field')}",
        )

    def damaged(self, error: Exception, *, place: str, mend: str = "it is cut off or damaged: fetch it again") -> None:
        self.report(
            "damaged",
            place=place,
            value=str(error) or type(error).__name__,
            allowed="a whole file",
            mend=mend,
        )
