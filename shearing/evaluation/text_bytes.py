"""How many bytes of text each token id stands for, so that bits per byte needs no decoding of the evaluated tokens.

V is the size of the vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of UTF-8 text by token id; special tokens stand for none.

    Attributes:
        length: [V] int64, bytes of a token inside a text.
        first: [V] int64, bytes of a token that begins a text; shorter where the tokenizer puts a space in front of it.
        special: [V] bool, tokens that are not text and separate texts.
    """

    length: Tensor
    first: Tensor
    special: Tensor

    def to(self, device: torch.device) -> TokenBytes:
        return TokenBytes(self.length.to(device), self.first.to(device), self.special.to(device))

    def count(self, tokens_BT: Tensor, *, leave_out_BS: Tensor | None = None, begins_B: Tensor | None = None) -> Tensor:
        """Bytes of the text of every token but the first of each row, which only says whether a text begins after it.

        Args:
            tokens_BT: int64 token ids.
            leave_out_BS: bool, further tokens that do not count, among all but the first of each row.
            begins_B: bool, whether a text begins behind the first token of each row; None: where that one is special.

        Returns:
            A scalar int64 tensor on the device of `tokens_BT`; nothing is read back from the device.
        """
        labels_BS = tokens_BT[:, 1:]
        begins_BS = self.special[tokens_BT[:, :-1]]
        if begins_B is not None:
            begins_BS[:, 0] = begins_B
        bytes_BS = torch.where(begins_BS, self.first[labels_BS], self.length[labels_BS])
        return (bytes_BS if leave_out_BS is None else bytes_BS.masked_fill(leave_out_BS, 0)).sum()


def token_bytes(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> TokenBytes | None:
    """The bytes of every token of a byte-level or byte-fallback tokenizer.

    Byte-level tokens spell each byte as one character, so their length is exact even where a token holds a part of a
    multi-byte character and cannot be decoded alone. SentencePiece tokens spell a space as "▁" and unknown bytes as
    "<0xE2>".

    Args:
        tokenizer: a fast tokenizer of Hugging Face.
        vocab_size: rows of the model's embedding (V); ids that the tokenizer does not know count zero bytes.

    Returns:
        None for a tokenizer of another kind, whose tokens do not add up to bytes of text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    description = json.loads(backend.to_str())
    decoders = list(_steps(description.get("decoder")))
    kinds = {decoder["type"] for decoder in decoders}
    model = description["model"]
    byte_level = "ByteLevel" in kinds
    byte_fallback = bool(model.get("byte_fallback"))
    if not byte_level and not byte_fallback:
        return None

    # A tokenizer that strips a space when decoding has put it there when encoding: it is no byte of the text.
    strips_space = any(
        (decoder["type"] == "Strip" and decoder.get("content") == " " and decoder.get("start", 0) > 0)
        or (decoder["type"] == "Metaspace" and decoder.get("prepend_scheme", "always") != "never")
        for decoder in decoders
    )
    # Filled as lists: setting elements of a tensor one by one takes seconds for a large vocabulary.
    lengths, firsts, special = [0] * vocab_size, [0] * vocab_size, [False] * vocab_size
    for token, index in backend.get_vocab(with_added_tokens=False).items():
        if index >= vocab_size:
            continue
        if byte_level:
            length = len(token)
        elif _BYTE_TOKEN.fullmatch(token):
            length = 1
        else:
            length = len(token.replace("▁", " ").encode())
        lengths[index] = length
        firsts[index] = length - (strips_space and token.startswith("▁"))
    for added in description.get("added_tokens", []):
        index = added["id"]
        if index < vocab_size:
            lengths[index] = firsts[index] = 0 if added["special"] else len(added["content"].encode())
            special[index] = added["special"]
    return TokenBytes(torch.tensor(lengths), torch.tensor(firsts), torch.tensor(special))


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The single steps of a decoder, sequences unfolded."""
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder
