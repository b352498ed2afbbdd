"""Calibration text out of files of every kind: the text and nothing around it, as preparation tokenises it."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from shearing.data.documents import DocumentRules
from shearing.errors import ShearingError
from shearing.pruning.calibration import text as module
from shearing.pruning.calibration.text import load_calibration
from tests.data.texts.tokenizers import byte_level, sentence_piece

TEXTS = [f"document {number} says <|im_end|> and </s>, über {{all}}" for number in range(30)]
LINES = b"\n".join(orjson.dumps({"url": "https://x", "text": text}) for text in TEXTS)
INDENT = orjson.OPT_INDENT_2
FILES: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.json": lambda path: path.write_bytes(orjson.dumps([{"text": text} for text in TEXTS], option=INDENT)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.json.zst": lambda path: path.write_bytes(zstandard.ZstdCompressor().compress(LINES)),
    "a.parquet": lambda path: pq.write_table(pa.table({"id": range(30), "text": TEXTS}), path, row_group_size=7),
}


def rows(paths: list[Path], tokenizer: Any, **changes: Any) -> torch.Tensor:
    chosen = {"vocab_size": 1000, "samples": 20, "seqlen": 16, "seed": 0, **changes}
    return load_calibration(paths, tokenizer=tokenizer, **chosen).tokens


@pytest.fixture
def plain(tmp_path: Path) -> list[Path]:
    """The same documents, each a file of text."""
    paths = [tmp_path / f"{number}.txt" for number in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text)
    return paths


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", [byte_level, sentence_piece])
def test_documents_in_files_of_every_kind(name: str, kind: Any, plain: list[Path], tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    tokenizer = kind()
    found = rows([tmp_path / name], tokenizer)
    assert torch.equal(found, rows(plain, tokenizer))
    # Documents end in the end of text, which no document can spell.
    ids = [i for text in TEXTS for i in [*tokenizer.encode(text, split_special_tokens=True), tokenizer.eos_token_id]]
    stream = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)
    assert all((stream == row).all(1).any() for row in found)
    assert not torch.equal(found, rows([tmp_path / name], tokenizer, seed=1))


def test_as_preparation_tokenises(plain: list[Path], tmp_path: Path) -> None:
    from rich.console import Console

    from data_tools.preparation.prepare import prepare
    from data_tools.preparation.recipe import load_preparation

    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    FILES["a.jsonl"](tmp_path / "a.jsonl")
    values = {"output": str(tmp_path / "corpus"), "tokenizer": str(tmp_path / "tokenizer"), "workers": 1}
    options = {key: (value, key) for key, value in {**values, "domains": {"d": str(tmp_path / "a.jsonl")}}.items()}
    corpus = prepare(load_preparation(None, options=options), console=Console(quiet=True))
    assert corpus is not None
    prepared = set()
    for split in ("train", "validation", "test"):
        tokens = np.asarray(corpus.tokens("d", split=split).read(0, 10**6))
        ends = corpus.document_ends("d", split=split)
        prepared |= {tuple(part.tolist()) for part in np.split(tokens, ends[:-1])}
    for path in plain:
        length = len(tokenizer.encode(path.read_text(), split_special_tokens=True)) + 1
        assert tuple(rows([path], tokenizer, samples=1, seqlen=length)[0].tolist()) in prepared


def test_a_field_inside_of_a_field(plain: list[Path], tmp_path: Path) -> None:
    table = pa.table({"data": pa.array([{"body": text, "n": 1} for text in TEXTS])})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.json").write_bytes(orjson.dumps([{"data": {"body": text}} for text in TEXTS]))
    for name in ("a.parquet", "a.json"):
        found = rows([tmp_path / name], byte_level(), text_field="data.body")
        assert torch.equal(found, rows(plain, byte_level()))
        with pytest.raises(ShearingError, match=r"text_field") as stopped:
            rows([tmp_path / name], byte_level())
        assert "data.body" in str(stopped.value)
        assert "bad_input" not in str(stopped.value)


def test_no_more_is_read_than_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "READ_TIMES", 2)
    (tmp_path / "a.jsonl").write_bytes(LINES + b"\nbroken")
    assert rows([tmp_path / "a.jsonl"], byte_level()).shape == (20, 16)
    monkeypatch.setattr(module, "READ_TIMES", 10**6)
    with pytest.raises(ShearingError, match="31"):
        rows([tmp_path / "a.jsonl"], byte_level())


def test_rows_behind_do_not_change_those_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither where there are enough of them, nor where more has to be read for them."""
    letters = np.random.default_rng(0).choice(list("abcdefgh"), (30, 60))
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(orjson.dumps({"text": "".join(text)}) for text in letters))
    monkeypatch.setattr(module, "READ_TIMES", 2)
    alone = rows([tmp_path / "a.jsonl"], byte_level(), samples=10)
    for more in (5, 35):
        both = rows([tmp_path / "a.jsonl"], byte_level(), samples=10, more=more)
        assert torch.equal(both[:10], alone)
        assert both.shape == (10 + more, 16)
        assert len({tuple(row) for row in both.tolist()}) == 10 + more
    with pytest.raises(ShearingError, match="samples = 210"):
        rows([tmp_path / "a.jsonl"], byte_level(), samples=10, more=200)


@pytest.mark.parametrize("bos", ["none", "document", "row"])
def test_documents_of_files_are_told_as_those_of_a_corpus(bos: Any, tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.bos_token = "<|endoftext|>"
    (tmp_path / "a.jsonl").write_bytes(LINES)
    rules = DocumentRules(attention_within=True, loss_across=False)
    chosen: dict[str, Any] = {"vocab_size": 1000, "samples": 60, "seqlen": 16, "seed": 0, "bos": bos}
    told = load_calibration([tmp_path / "a.jsonl"], tokenizer=tokenizer, documents=rules, **chosen)
    plain = load_calibration([tmp_path / "a.jsonl"], tokenizer=tokenizer, **chosen)
    assert torch.equal(told.tokens, plain.tokens)
    assert (plain.positions, plain.counted) == (None, None)
    assert told.fingerprint != plain.fingerprint
    assert told.positions is not None
    assert told.counted is not None
    ended = told.tokens[:, :-1] == tokenizer.eos_token_id
    begins = torch.cat([torch.ones(60, 1, dtype=torch.bool), ended], dim=1)
    assert ended.any()
    assert torch.equal(told.positions == 0, begins)
    assert torch.equal(told.positions[:, 1:][~ended], told.positions[:, :-1][~ended] + 1)
    assert torch.equal(told.counted[:, 1:], ~ended)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES)[:-9])
    for path, message in (("a.txt", "UTF-8"), ("b.jsonl.gz", "cut off"), ("absent.parquet", "No such file")):
        with pytest.raises(ShearingError, match=message):
            rows([tmp_path / path], byte_level(), samples=400)
