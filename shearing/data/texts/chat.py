"""Chats to text through the template of a tokenizer, and that text to tokens.

A template writes special tokens: they become these tokens. What a message says is text: `<|im_end|>` in there is
spelled in letters. Rendered, the two look the same; so between rendering and tokenising a chat is *marked text*, where
characters that no text may have (Unicode keeps them out of what is exchanged) stand for

    n in a pair of SPECIAL      the n-th special token, written by the template
    BEGIN, END                  around what an assistant says, where only answers are to be learned

Special tokens in messages are broken by a character before the template sees them, so that none is found there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from shearing.data.texts.encoding import Encoded
from shearing.errors import ShearingError, key

if TYPE_CHECKING:
    from shearing.data.texts.bad_input import BadInput

BREAK, SPECIAL, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_RESERVED = {ord(character): "\ufffd" for character in (BREAK, SPECIAL, BEGIN, END)}
_MARKED_SPECIAL = re.compile(f"{SPECIAL}(\\d+){SPECIAL}")
_NUMBERED = re.compile(f"({BEGIN}|{END})(\\d+)\\1")
_LINE, _TAG = re.compile(r"\S+(?:[^\S\n]+\S+)*"), re.compile(r"</?\w+>")
# The token that ends a turn is learned with it.
_END_OF_TURN = re.compile(f"{END}(\\s*{SPECIAL}\\d+{SPECIAL})")
# What templates compare with names; marks around them would change what is rendered.
_NAMES = ("role", "type", "id", "name", "tool_call_id")
_WRITTEN_BY_TEMPLATE = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A template that asks for the date gets the same one every day, or the same text would have other tokens tomorrow.
_DATE = "{% macro strftime_now(form) %}{{ '2024-07-26' if form == '%Y-%m-%d' else '26 Jul 2024' }}{% endmacro %}\n"


class _ChatError(Exception):
    """What is wrong with a chat, and how to mend it."""

    def __init__(self, found: str, mend: str) -> None:
        super().__init__(found)
        self.found, self.mend = found, mend


@dataclass(frozen=True)
class ChatTemplate:
    """How a tokenizer writes chats.

    Attributes:
        template: Jinja, as in chat_template.jinja.
        names: of special tokens, for the template: `bos_token` and others.
        specials: all special tokens.
        answers: whether what an assistant says is marked.
        trusted: whether special tokens in messages are these tokens.
    """

    template: str
    names: tuple[tuple[str, str], ...]
    specials: tuple[str, ...]
    answers: bool = False
    trusted: bool = False

    @classmethod
    def of(cls, tokenizer: Any, *, answers: bool = False, trusted: bool = False) -> ChatTemplate:
        """That of a fast tokenizer of `transformers`; of several the one named default.

        Raises:
            ShearingError: it has none.
        """
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ShearingError(
                "tokenizer",
                value=f"{tokenizer.name_or_path}, which has no chat template",
                allowed="a tokenizer with a chat template, to write chats with",
                mend="put the chat_template.jinja of the model's chat version beside its tokenizer.json, or write "
                "chats as text yourself",
            ) from error
        named = sorted(tokenizer.special_tokens_map.items())
        names = tuple((name, token) for name, token in named if isinstance(token, str))
        return cls(template, names, special_tokens(tokenizer.backend_tokenizer.to_str()), answers, trusted)

    def text_of(self, value: object, *, field: str, place: str, bad: BadInput) -> str | None:
        """Marked text of messages; None, and `bad` is told, where there are none or the template refuses them."""
        try:
            return self.render(value)
        except _ChatError as error:
            what = "messages with role and content that the template takes"
            allowed = f"{what}, in the field {field!r}"
            bad.report("bad_chat", place=place, value=error.found, allowed=allowed, mend=error.mend)
            return None

    def render(self, value: object) -> str:
        """Marked text of a list of messages."""
        messages = _messages(value)
        if not self.trusted:
            messages = _mapped(messages, self._broken)
        by_template = self.answers and _WRITTEN_BY_TEMPLATE.search(self.template) is not None
        if by_template:
            text, spans = self._rendered(messages, spans=True)
            for start, end in reversed(spans):
                text = f"{text[:start]}{BEGIN}{text[start:end]}{END}{text[end:]}"
        elif self.answers:
            text = self._with_answers(messages)
        else:
            text, _ = self._rendered(messages)
        text = self._special.sub(lambda found: f"{SPECIAL}{self._numbers[found[0]]}{SPECIAL}", text)
        text = text.replace(BREAK, "")
        return text if by_template else _END_OF_TURN.sub(f"\\1{END}", text)

    def plain(self, marked: str) -> str:
        """What a chat says: marked text with special tokens as they are written, and no marks."""
        text = marked.replace(BEGIN, "").replace(END, "")
        return _MARKED_SPECIAL.sub(lambda found: self.specials[int(found[1])], text)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        longest_first = sorted(self.specials, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.specials)}

    def _broken(self, text: str) -> str:
        return self._special.sub(lambda found: f"{found[0][0]}{BREAK}{found[0][1:]}", text)

    def _rendered(self, messages: Any, *, spans: bool = False) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        dated = _DATE if "strftime_now" in self.template else ""
        try:
            names: dict[str, Any] = dict(self.names)
            rendered: Any = render_jinja_template(
                [messages], chat_template=dated + self.template, return_assistant_tokens_mask=spans, **names
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise _ChatError(
                f"the chat template says: {error}", "write the messages as the template wants them"
            ) from error
        texts, found = rendered
        return texts[0], list(found[0]) if spans else []

    def _with_answers(self, messages: list[dict[str, Any]]) -> str:
        """Rendered with marks around the answers: of each message of an assistant, from its first word to its last.

        Marks around the whole text are found where a template writes it as it is; where it trims it, or leaves out a
        part, those around each line.
        """
        bare, _ = self._rendered(messages)
        for lines in (False, True):
            marked = [_numbered(each, number, lines=lines) for number, each in enumerate(messages)]
            found, spans = _places_of_numbers(self._rendered(marked)[0])
            if found == bare and all(start <= end for start, end in spans):
                for start, end in sorted(spans, reverse=True):
                    bare = f"{bare[:start]}{BEGIN}{bare[start:end]}{END}{bare[end:]}"
                return bare
        raise _ChatError(
            "the chat template rewrites answers, so that they cannot be found in what it writes",
            "put {% generation %} and {% endgeneration %} around answers in the template, or learn all of the chat",
        )


class ChatTokenizer:
    """Tokens of marked text.

    In a copy of the tokenizer special tokens have other names, which only marks have: so what it cuts out of a text and
    how it treats the text between them is as in the tokenizer itself, and a name spelled out in a text is letters.

    Args:
        tokenizer_json: content of a tokenizer.json.
        template: what has rendered the chats.
    """

    def __init__(self, tokenizer_json: str, *, template: ChatTemplate) -> None:
        content = json.loads(tokenizer_json)
        own = {token["content"]: token["id"] for token in content["added_tokens"]}
        numbers = {token: number for number, token in enumerate(template.specials)}
        for token in content["added_tokens"]:
            if token["content"] in numbers:
                token["content"] = f"{SPECIAL}{numbers[token['content']]}{SPECIAL}"
        self._tokenizer = Tokenizer.from_str(json.dumps(content))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._ids = np.arange(max(self._tokenizer.get_vocab().values()) + 1)
        for token, number in numbers.items():
            self._ids[self._tokenizer.token_to_id(f"{SPECIAL}{number}{SPECIAL}")] = own[token]
        self._answers = template.answers

    def encode(self, marked: Sequence[str]) -> list[Encoded]:
        """Of each chat its tokens; a token counts if a character of an answer is in it."""
        texts, spans = zip(*map(_unmarked, marked), strict=True) if marked else ((), ())
        encode = self._tokenizer.encode_batch if self._answers else self._tokenizer.encode_batch_fast
        found = []
        for encoding, answers in zip(encode(list(texts), add_special_tokens=False), spans, strict=True):
            counted = None
            if self._answers:
                counted = np.zeros(len(encoding.ids), dtype=np.bool_)
                starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
                for start, end in answers:
                    counted |= (starts < end) & (ends > start)
            found.append(Encoded(self._ids[encoding.ids].tolist(), counted))
        return found


def special_tokens(tokenizer_json: str) -> tuple[str, ...]:
    """The special tokens of a tokenizer.json."""
    return tuple(token["content"] for token in json.loads(tokenizer_json)["added_tokens"] if token["special"])


def _unmarked(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Marked text without marks of answers, and where these were, as characters."""
    pieces, spans, at, start = [], [], 0, 0
    for piece in re.split(f"({BEGIN}|{END})", marked):
        if piece == BEGIN:
            start = at
        elif piece == END:
            spans.append((start, at))
        else:
            pieces.append(piece)
            at += len(piece)
    return "".join(pieces), spans


def _messages(value: object) -> list[dict[str, Any]]:
    """Messages without what is null in them, as tables have fields that others use, and without reserved characters."""
    mend = f"name the field that holds the messages: {key('text_field')}"
    if not isinstance(value, list) or not value:
        raise _ChatError(f"{'an empty list' if value == [] else type(value).__name__} and no list of messages", mend)
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            found = f"fields {', '.join(message)}" if isinstance(message, dict) else type(message).__name__
            mend = "give each message a role and a content"
            if isinstance(message, dict) and "from" in message:
                mend = f"rename {' and '.join(message)} to role and content, and the roles to user and assistant"
            raise _ChatError(f"a message with {found}", mend)
    messages: list[dict[str, Any]] = _mapped(_without_nulls(value), lambda text: text.translate(_RESERVED))
    return messages


def _numbered(message: dict[str, Any], number: int, *, lines: bool) -> dict[str, Any]:
    """An assistant's message with marks around each of its texts, or each line of these that is more than a tag."""
    if message["role"] != "assistant":
        return message

    def whole(text: str) -> str:
        return text and f"{BEGIN}{number}{BEGIN}{text}{END}{number}{END}"

    def each_line(text: str) -> str:
        return _LINE.sub(lambda found: found[0] if _TAG.fullmatch(found[0]) else whole(found[0]), text)

    marked: dict[str, Any] = _mapped(message, each_line if lines else whole, besides=_NAMES)
    return marked


def _places_of_numbers(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without the marks of `_numbered`; of each number from where to where its marks reach."""
    begins: dict[str, int] = {}
    ends: dict[str, int] = {}
    bare, last = "", 0
    for found in _NUMBERED.finditer(text):
        bare += text[last : found.start()]
        last = found.end()
        if found[1] == BEGIN:
            begins.setdefault(found[2], len(bare))
        else:
            ends[found[2]] = len(bare)
    # One mark without the other: a part was left out in the middle of it, and the text is not the same either.
    spans = [(begins.get(number, len(text)), ends.get(number, -1)) for number in {**begins, **ends}]
    return bare + text[last:], spans


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _mapped(value: Any, change: Callable[[str], str], *, besides: Collection[str] = ()) -> Any:
    """Messages with all their texts changed, but for fields of these names."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            name: each if name in besides else _mapped(each, change, besides=besides) for name, each in value.items()
        }
    return [_mapped(each, change, besides=besides) for each in value] if isinstance(value, list) else value
