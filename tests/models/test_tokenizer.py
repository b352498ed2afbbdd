"""Tokens are those of the model's own tokenizer.json, whatever class its config names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from shearing.errors import ShearingError
from shearing.models import tokenizer as module
from shearing.models.tokenizer import PROBES, BeginTokens, begin_tokens, load_tokenizer, open_tokenizer

SPECIAL = ["<s>", "</s>", "<unk>"]


def byte_level(folder: Path, *, front: bool = False, **config: Any) -> Path:
    """A byte-level tokenizer without merges, as `tokenizer.json` has it, and what a config says of it."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({token: index for index, token in enumerate([*SPECIAL, *alphabet])}, []))
    own.add_special_tokens(SPECIAL)
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    if front:
        own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    own.save(str(folder / "tokenizer.json"))
    said = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(
    "name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", "CodeLlamaTokenizer", "NoSuchTokenizer"]
)
def test_tokens_are_those_of_the_file_whatever_class_is_named(name: str, tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "model", tokenizer_class=name, chat_template="{{ messages }}")
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = open_tokenizer(str(folder))
    for text in (*PROBES, "a<s>b</s> c", "x" * 50):
        ids = own.encode(text, add_special_tokens=False).ids
        assert found.full.encode(text, add_special_tokens=False) == ids
        assert found.backend.encode(text, add_special_tokens=False).ids == ids
        assert found.backend.decode(ids) == own.decode(ids)
    assert (found.full.eos_token, found.full.chat_template) == ("</s>", "{{ messages }}")


def test_a_class_that_does_otherwise_is_replaced_and_this_is_said(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "model", tokenizer_class="CodeLlamaTokenizer")
    text = "two words"
    named = AutoTokenizer.from_pretrained(folder)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert named.encode(text, add_special_tokens=False) != own.encode(text, add_special_tokens=False).ids
    found = open_tokenizer(str(folder))
    assert "CodeLlamaTokenizer" in (found.notice or "")
    assert "its own tokenizer.json is used" in (found.notice or "")
    assert open_tokenizer(str(byte_level(tmp_path / "other"))).notice is None


def test_the_files_own_is_made_where_no_class_does_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = byte_level(tmp_path / "model", chat_template="{{ messages }}", eos_token={"content": "</s>"})
    differences = iter(["a", "b"])
    monkeypatch.setattr(module, "_difference", lambda *_, **__: next(differences))
    found = open_tokenizer(str(folder)).full
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert found.encode("two words", add_special_tokens=False) == own.encode("two words", add_special_tokens=False).ids
    assert (found.bos_token, found.eos_token, found.chat_template) == ("<s>", "</s>", "{{ messages }}")


def test_truncation_and_padding_of_the_file_are_not_taken_over(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "model")
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.enable_truncation(4)
    own.enable_padding(length=9)
    own.save(str(folder / "tokenizer.json"))
    found = open_tokenizer(str(folder))
    assert found.notice is None
    assert len(found.backend.encode("x" * 50, add_special_tokens=False).ids) == 50
    assert len(found.backend.encode("x", add_special_tokens=False).ids) == 1


def test_the_token_in_front_is_what_the_post_processor_puts_there(tmp_path: Path) -> None:
    def of(name: str, **given: Any) -> BeginTokens:
        return begin_tokens(load_tokenizer(str(byte_level(tmp_path / name, **given))))

    assert of("front", front=True) == BeginTokens(front=0, named=0)
    assert of("none") == BeginTokens(front=None, named=0)
    assert of("unnamed", bos_token=None) == BeginTokens(front=None, named=None)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "add the tokenizer's files"),
        (["tokenizer.model"], "pip install sentencepiece"),
        (["vocab.json", "merges.txt"], "save_pretrained"),
        (["tekken.json"], "there is tekken.json"),
    ],
)
def test_a_model_without_tokenizer_json_is_told_how_to_get_one(files: list[str], said: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ShearingError) as raised:
        load_tokenizer(str(tmp_path))
    assert said in str(raised.value)


def test_a_damaged_file_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ShearingError, match=r"source \(tokenizer.json\)"):
        load_tokenizer(str(tmp_path))
    folder = byte_level(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("[")
    found = open_tokenizer(str(folder))
    assert "is refused by transformers" in (found.notice or "")
    assert found.full.encode("ab", add_special_tokens=False) == [len(SPECIAL) + 64, len(SPECIAL) + 65]
