"""Bytes of tokens against the bytes of the text that was tokenised."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from shearing.evaluation.text_bytes import TokenBytes, token_bytes

TEXTS = [
    "naïve café",
    "日本語 text",
    "emoji 👩‍🚀 and\ttabs\n",
    " leading",
    "plain words, plain words",
    "<end> is no end",
]


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("→→", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2: a space in front of every text, unknown characters as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "p", "l", "a", "i", "n", "é"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}


def bytes_of(tokenizer: PreTrainedTokenizerFast) -> TokenBytes:
    table = token_bytes(tokenizer, vocab_size=len(tokenizer) + 3)
    assert table is not None
    return table


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4))
def test_bytes_of_documents_are_those_of_their_text(name: str, texts: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    texts = [*TEXTS, *texts]
    end = tokenizer.eos_token_id
    row = [end]
    for text in texts:
        row += [*tokenizer.encode(text, add_special_tokens=False), end]

    counted = bytes_of(tokenizer).count(torch.tensor([row]))

    special = sum(text.count(token) * len(token) for text in texts for token in tokenizer.all_special_tokens)
    assert counted.item() == sum(len(text.encode()) for text in texts) - special


def test_a_character_cut_in_two_by_the_row_counts_the_bytes_in_the_row() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    tokens = tokenizer.encode("x日", add_special_tokens=False)  # ▁, a byte of x, three bytes

    assert bytes_of(tokenizer).count(torch.tensor([tokens[:-1]])).item() == 1 + 2


def test_added_text_counts_its_bytes_and_special_or_unknown_ids_count_none() -> None:
    tokenizer = TOKENIZERS["byte level"]
    table = bytes_of(tokenizer)

    assert table.length[tokenizer.convert_tokens_to_ids("→→")] == 6
    assert table.length[tokenizer.eos_token_id] == 0
    assert table.length[-3:].sum() == 0


def test_the_whole_vocabulary_agrees_with_the_decoder() -> None:
    tokenizer = TOKENIZERS["byte level"]
    table = bytes_of(tokenizer)
    for token, index in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"].items():
        text = tokenizer.decode([index], skip_special_tokens=True)
        if "\ufffd" not in text:
            assert table.length[index] == len(text.encode()), token


def test_tokens_that_do_not_spell_bytes_give_no_table() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))

    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer), vocab_size=2) is None
