"""What the documents of a domain are, text or chats, and how they become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shearing.data.texts.chat import ChatTemplate, ChatTokenizer
from shearing.data.texts.encoding import PlainTokenizer


@dataclass(frozen=True)
class Form:
    """What the documents of a domain are.

    Attributes:
        chat: renders them; None: they are text.
        special_tokens: whether special tokens that are spelled out in texts are these tokens.
    """

    chat: ChatTemplate | None = None
    special_tokens: bool = False

    @property
    def answers(self) -> bool:
        """Whether only what an assistant says counts in a loss."""
        return self.chat is not None and self.chat.answers

    def tokenizer(self, path: Path) -> PlainTokenizer | ChatTokenizer:
        """What encodes them, of a tokenizer.json."""
        content = path.read_text(encoding="utf-8")
        if self.chat is not None:
            return ChatTokenizer(content, template=self.chat)
        return PlainTokenizer(content, special_tokens=self.special_tokens)

    def plain(self, text: str) -> str:
        """A document as people read it; see `chat`."""
        return text if self.chat is None else self.chat.plain(text)
