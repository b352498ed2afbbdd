"""What a preparation says beside the corpus that it makes: splits far from what was asked for, a disk that is full."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_tools.preparation import prepare as module, steps
from shearing.cli.frame import app
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import HELD_OUT
from shearing.data.corpus.shards import ShardWriter
from shearing.errors import ShearingError
from tests.data_tools.conftest import texts_of, write_lines

Prepared = Callable[..., Corpus]
TEXTS = [f"line {i}" for i in range(12)]


def test_one_long_document_does_not_take_the_domain(letters: Path, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [*TEXTS, "long " * 900])
    typed = ["data", "prepare", "--domain", f"a={lines}", "--tokenizer", str(letters), "--workers", "1"]
    result = CliRunner().invoke(app, [*typed, "-o", str(tmp_path / "corpus")], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    corpus = Corpus.open(tmp_path / "corpus")
    assert "long " * 900 in texts_of(corpus, "a", "train")
    for split in HELD_OUT:
        assert f"a: {split} has {corpus.split_tokens('a', split)} of 4,5" in result.output
    assert result.output.count("were asked for (5%)") == 2


def test_a_full_disk_is_said(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    domains = {"a": str(write_lines(tmp_path / "a.jsonl", TEXTS))}
    for where, name in ((ShardWriter, "close"), (steps, "write_domain_folder"), (module, "write_text")):
        with monkeypatch.context() as patched:
            patched.setattr(where, name, full)
            with pytest.raises(ShearingError, match="room for twice the corpus") as error:
                prepared(domains)
        assert error.value.field == "output"
        shutil.rmtree(tmp_path / "corpus")
    prepared(domains)
