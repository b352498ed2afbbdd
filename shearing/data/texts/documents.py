"""One document of a file: which field holds it, and what of a value is its text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from shearing.data.texts.bad_input import BadInput
from shearing.data.texts.kinds import Compression, Kind

if TYPE_CHECKING:
    from shearing.data.texts.chat import ChatTemplate

MISSING = object()


class Text(NamedTuple):
    """A document's text and its place: `file:line`, or `file, row 7`."""

    text: str
    place: str


@dataclass(frozen=True)
class TextFile:
    """A file, or a table of another kind, and what of it is text.

    Attributes:
        path: or URL, or a name for people.
        kind, compression: see `kind_of`; of no use where rows come from elsewhere.
        field: holds the text, or the messages of a chat; `data.text` is the field `text` of what `data` holds, unless
            there is a field `data.text`.
        chat: renders messages; None: the field holds text.
    """

    path: str
    kind: Kind
    field: str
    compression: Compression | None = None
    chat: ChatTemplate | None = None

    def text_of(self, record: object, *, place: str, bad: BadInput) -> str | None:
        """The text of an object of JSON or a row of a table; None, and `bad` is told, where there is none."""
        if not isinstance(record, Mapping):
            self._no_text(bad, place=place, found=f"a {type(record).__name__} and no object")
            return None
        value = value_at(record, self.field)
        if value is MISSING:
            self._no_text(bad, place=place, found=f"fields {', '.join(map(repr, _names(record)))}", fields=record)
            return None
        return self.text_of_value(value, place=place, bad=bad)

    def text_of_value(self, value: object, *, place: str, bad: BadInput) -> str | None:
        """The text of what is in the field; None, and `bad` is told, where there is none."""
        if self.chat is not None:
            return self.chat.text_of(value, field=self.field, place=place, bad=bad)
        if not isinstance(value, str):
            found = f"{type(value).__name__} in the field {self.field!r}"
            self._no_text(bad, place=place, found=found, fields={self.field: value})
            return None
        return without_halves(value)

    def no_field(self, names: list[str], *, like: Mapping[str, Any], bad: BadInput) -> None:
        """Tell `bad` that a table has other columns, and what in a row of it has the form that matters here."""
        self._no_text(bad, place=self.path, found=f"fields {', '.join(map(repr, names))}", fields=like)

    def no_string(self, column: str, *, like: Any, place: str, bad: BadInput) -> None:
        """Tell `bad` that the column is of another type, and of what form a value of it is."""
        self._no_text(bad, place=place, found=f"{column} in the field {self.field!r}", fields={self.field: like})

    def _no_text(self, bad: BadInput, *, place: str, found: str, fields: Mapping[str, Any] | None = None) -> None:
        if self.chat is not None:
            bad.no_text(place=place, text_field=self.field, found=found, what="messages")
        else:
            bad.no_text(place=place, text_field=self.field, found=found, mend=_of_chats(fields or {}))


def value_at(record: Mapping[str, Any], name: str) -> Any:
    """What lies in a field, by its name or by a dotted one; `MISSING` where there is no such field."""
    if name in record:
        return record[name]
    first, dot, rest = name.partition(".")
    if dot and isinstance(inner := record.get(first), Mapping):
        return value_at(inner, rest)
    return MISSING


def _of_chats(fields: Mapping[str, Any]) -> str | None:
    """What to do where one of the fields holds a chat in place of text; None: none does."""
    for name, value in fields.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, Mapping) and ("role" in first or "from" in first):
            field = "" if name == "messages" else f" --text-field {name}"
            prepare = f"`shear data prepare --format chat{field}`"
            if "role" in first and "content" in first:
                return f"{name!r} holds chats: {prepare}"
            return f"{name!r} holds chats: rename {' and '.join(first)} to role and content, then {prepare}"
    return None


def without_halves(text: str) -> str:
    """The text without halves of surrogate pairs, which no tokenizer takes; each is `?`."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _names(record: Mapping[str, Any], *, before: str = "") -> Iterator[str]:
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from _names(value, before=f"{before}{name}.")
        else:
            yield f"{before}{name}"
