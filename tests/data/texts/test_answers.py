"""Which tokens of a chat are answers: as a template says, or as the answers themselves are found in what it writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shearing.data.texts.chat import ChatTemplate, ChatTokenizer
from shearing.errors import ShearingError
from tests.data.texts.test_chat import CHAT, SYSTEM
from tests.data.texts.tokenizers import CHATML, GENERATION, INST, THINKING, byte_level, sentence_piece

FIRST = "\n\n\nthe answer: 4 <|im_end|>"
"""Two line breaks are one token, and the first of them ends the template's own line."""


def answers_of(tokenizer: Any, chat: list[dict[str, Any]]) -> list[str]:
    """Each run of tokens that count, decoded."""
    template = ChatTemplate.of(tokenizer, answers=True)
    encoder = ChatTokenizer(tokenizer.backend_tokenizer.to_str(), template=template)
    [(ids, counted)] = encoder.encode([template.render(chat)])
    assert counted is not None
    edges = np.flatnonzero(np.diff(np.concatenate([[False], counted, [False]]).astype(int)))
    return [tokenizer.decode(ids[start:stop]) for start, stop in edges.reshape(-1, 2).tolist()]


def test_a_template_that_says_so_itself() -> None:
    tokenizer = byte_level(GENERATION)
    template = ChatTemplate.of(tokenizer, answers=True)
    encoder = ChatTokenizer(tokenizer.backend_tokenizer.to_str(), template=template)
    for chat in (CHAT, SYSTEM, CHAT[:1]):
        expected = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        [(ids, counted)] = encoder.encode([template.render(chat)])
        assert ids == expected["input_ids"]
        assert counted is not None
        assert counted.tolist() == [bool(each) for each in expected["assistant_masks"]]


def test_answers_and_the_token_that_ends_them() -> None:
    assert answers_of(byte_level(CHATML), SYSTEM) == [FIRST, "no.<|im_end|>"]
    # Trimmed by the template, and a space before the end of a turn.
    assert answers_of(sentence_piece(INST), CHAT) == ["the answer: 4 </s>", "no. </s>"]
    assert answers_of(byte_level(CHATML), CHAT[:1]) == []


def test_what_a_user_copies_of_an_answer_is_no_answer() -> None:
    copied = [*CHAT[:2], {"role": "user", "content": CHAT[1]["content"]}, CHAT[3]]
    assert answers_of(byte_level(CHATML), copied) == [FIRST, "no.<|im_end|>"]


def test_thoughts_that_a_template_leaves_out_and_tools() -> None:
    thought = "<think>\nhm,\nwell\n</think>\n\n4\nor 5"
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [
        CHAT[0],
        {"role": "assistant", "content": thought},
        CHAT[2],
        {"role": "assistant", "content": thought, "tool_calls": [call]},
    ]
    tokenizer = byte_level(THINKING)
    earlier, last = answers_of(tokenizer, chat)
    assert earlier == "4\nor 5<|im_end|>"
    assert last.startswith("hm,\nwell\n</think>\n\n4\nor 5")
    # Numbers of a call are found by nothing.
    assert last.endswith("or 5") or "add" in last


def test_a_template_that_rewrites_answers() -> None:
    shouting = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
    assert answers_of(byte_level(shouting), CHAT[2:]) == ["NO."]
    title = "{% for m in messages %}{{ m.role }}: {{ m.content[:2] }} ({{ m.content | length }})\n{% endfor %}"
    template = ChatTemplate.of(byte_level(title), answers=True)
    with pytest.raises(Exception, match="rewrites answers"):
        template.render(CHAT)
    from shearing.data.texts.bad_input import BadInput
    from shearing.data.texts.documents import TextFile

    with pytest.raises(ShearingError, match="generation"):
        TextFile("a", "lines", "m", chat=template).text_of({"m": CHAT}, place="a:1", bad=BadInput("stop", 10**6))
