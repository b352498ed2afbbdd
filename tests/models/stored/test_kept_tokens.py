"""Vocabularies that are cut: text of kept tokens has the same tokens, and all else stays text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from shearing.errors import ShearingError
from shearing.models.stored.cut_vocabulary import KEPT, cut_vocabulary
from shearing.models.stored.kept_tokens import BpeTokenizer, choose_tokens, cut_tokenizer, require_cuttable
from shearing.models.stored.saving import round_weights, write_model
from tests.models.tiny import tiny_model
from tests.runs.export.tokenizers import BYTE_LEVEL, TEXTS, write_tokenizer

ROWS = 448
ALPHABET = "".join(TEXTS) + "<s>ñ\u0301\u4e01"


def counts_of(tokenizer: Tokenizer, texts: list[str]) -> Any:
    ids = [index for text in texts for index in tokenizer.encode(text, add_special_tokens=False).ids]
    return np.bincount(ids, minlength=ROWS)


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "llama"])
def test_text_of_kept_tokens_has_the_same_tokens(name: str, tmp_path: Path) -> None:
    before = write_tokenizer(tmp_path, name=name, bos=True)
    read = BpeTokenizer.read(tmp_path)
    sampled, unchanged = random.Random(0), 0
    for extra in (0, 7, 40):
        counts = np.array([sampled.random() for _ in range(ROWS)]) * 1000
        size = len(read.always()) + extra
        kept = choose_tokens(read, counts.astype(np.int64), size=size)
        assert len(kept) == size
        after = Tokenizer.from_str(json.dumps(cut_tokenizer(read, kept)))
        new = {old: index for index, old in enumerate(kept)}
        for _ in range(150):
            text = "".join(sampled.choices(ALPHABET, k=sampled.randint(1, 6))) + sampled.choice(["", "</s>", "<think>"])
            ids, now = before.encode(text).ids, after.encode(text).ids
            if set(ids) <= set(kept):
                assert now == [new[old] for old in ids], (text, extra)
                unchanged += 1
            assert after.decode(now, skip_special_tokens=False) == before.decode(ids, skip_special_tokens=False)
    assert unchanged > 20


@settings(max_examples=60)
@given(st.text(max_size=12))
def test_any_text_comes_back(text: str) -> None:
    before, read = _TRAINED
    kept = choose_tokens(read, counts_of(before, TEXTS[:1]), size="auto")
    after = Tokenizer.from_str(json.dumps(cut_tokenizer(read, kept)))
    assert after.decode(after.encode(text).ids) == before.decode(before.encode(text).ids)


def _trained(folder: Path) -> tuple[Tokenizer, BpeTokenizer]:
    return write_tokenizer(folder, name="gpt-2"), BpeTokenizer.read(folder)


@pytest.fixture(scope="module", autouse=True)
def _tokenizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _TRAINED
    _TRAINED = _trained(tmp_path_factory.mktemp("tokenizer"))


def test_auto_keeps_all_that_a_text_uses_and_fills_up(tmp_path: Path) -> None:
    before = write_tokenizer(tmp_path, name="qwen2", size=440)
    read = BpeTokenizer.read(tmp_path)
    counts = counts_of(before, TEXTS[:1])
    kept = choose_tokens(read, counts, size="auto")
    assert set(np.flatnonzero(counts)) <= set(kept)
    assert len(kept) % 64 == 0 or len(kept) == read.size
    assert read.always() <= set(kept)
    everything = choose_tokens(read, np.ones(ROWS, np.int64), size="auto")
    assert everything == list(range(read.size))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_kept_rows_and_ids_are_what_they_were(tied: bool, shard_bytes: int, tmp_path: Path) -> None:
    model = tiny_model(tied=tied, vocab_size=ROWS)
    before = write_tokenizer(tmp_path, name="smollm", bos=True)
    ids = {name: before.token_to_id(name) for name in ("<s>", "</s>", "<think>", "a")}
    model.config.bos_token_id, model.config.eos_token_id = ids["<s>"], [ids["</s>"], ids["<think>"]]
    model.config.pad_token_id = ROWS - 1  # a row of no token
    round_weights(model, dtype=torch.bfloat16)
    write_model(model, tmp_path, dtype=torch.bfloat16, shard_bytes=shard_bytes)
    generation = {"bos_token_id": ids["<s>"], "eos_token_id": [ids["</s>"]], "bad_words_ids": [[300, 301]]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation | {"temperature": 0.6}))
    (tmp_path / "vocab.json").write_text("{}")
    decoder = {str(ids["<s>"]): {"content": "<s>"}}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    kept = cut_vocabulary(tmp_path, counts=counts_of(before, TEXTS), size=320)
    new = {old: index for index, old in enumerate(kept)}
    assert len(kept) == 320
    assert {300, 301} <= set(kept)

    after = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert (after.config.vocab_size, after.config.bos_token_id) == (320, new[ids["<s>"]])
    assert after.config.eos_token_id == [new[ids["</s>"]], new[ids["<think>"]]]
    assert after.config.pad_token_id is None
    said = json.loads((tmp_path / "generation_config.json").read_text())
    assert said["bad_words_ids"] == [[new[300], new[301]]]
    assert (said["temperature"], said["eos_token_id"]) == (0.6, [new[ids["</s>"]]])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"] == {str(new[ids["<s>"]]): {"content": "<s>"}}
    assert not (tmp_path / "vocab.json").exists()
    assert json.loads((tmp_path / KEPT).read_text()) == {"rows": ROWS, "kept": kept}
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("a").ids == [new[ids["<s>"]], new[ids["a"]]]
    for (name, was), now in zip(model.named_parameters(), after.parameters(), strict=True):
        rows = was[kept] if name in ("model.embed_tokens.weight", "lm_head.weight") else was
        assert torch.equal(now, rows.bfloat16()), name
    stored = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    if len(stored) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        size = sum(tensor.nbytes for of_file in stored for tensor in of_file.values())
        assert index["metadata"]["total_size"] == size
    tokens = torch.tensor([new[old] for old in before.encode(TEXTS[0]).ids if old in new])
    after = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(kept)[tokens][None]).logits[..., kept]
        torch.testing.assert_close(after(tokens[None]).logits, expected)


def test_what_cannot_be_cut_is_refused(tmp_path: Path, tiny_inputs: Path) -> None:
    with pytest.raises(ShearingError, match=r"WordLevel'\n  allowed: a tokenizer.json of BPE"):
        require_cuttable(tiny_inputs / "model", size="auto")
    with pytest.raises(ShearingError, match=r"no .*tokenizer\.json"):
        require_cuttable(tmp_path, size="auto")
    write_tokenizer(tmp_path, name="gpt-2")
    require_cuttable(tmp_path, size=300)
    for size in (200, 1000):
        with pytest.raises(ShearingError, match=rf"vocab_size = {size}\n  allowed: 260 to "):
            require_cuttable(tmp_path, size=size)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(ShearingError, match="without bytes"):
        require_cuttable(tmp_path, size="auto")
