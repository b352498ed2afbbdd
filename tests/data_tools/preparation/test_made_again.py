"""A domain whose folder is removed, and made again beside the others: the same bytes, or an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_tools.preparation.work_folder import PREFIX
from shearing.data.corpus.corpus import Corpus
from shearing.errors import ShearingError
from tests.data_tools.conftest import content, write_lines

Prepared = Callable[..., Corpus]
SIZES = {"validation": "10%", "test": "10%"}


@pytest.mark.parametrize("first", ["", "a", "b"])
def test_texts_that_others_have_too(first: str, prepared: Prepared, tmp_path: Path) -> None:
    """Prepared in one command, or one of them before the other."""
    generator = np.random.default_rng(11)
    a, b = (["".join(generator.choice(list("abcdef"), size=n)) for n in generator.integers(5, 60, 100)] for _ in "ab")
    texts = {"a": str(write_lines(tmp_path / "a.jsonl", a)), "b": str(write_lines(tmp_path / "b.jsonl", a[:50] + b))}
    if first:
        prepared({first: texts[first]}, **SIZES)
    corpus = prepared(texts, **SIZES)
    before = content(corpus.path)
    for name in texts:
        shutil.rmtree(corpus.path / name)
        prepared(texts, **SIZES)
        assert content(corpus.path) == before


def test_near_duplicates_of_domains_that_are_kept(prepared: Prepared, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    words = ["".join(generator.choice(list("abcdefghij"), size=5)) for _ in range(400)]
    originals = [" ".join(generator.choice(words, size=120)) for _ in range(30)]
    a = write_lines(tmp_path / "a.jsonl", originals)
    b = write_lines(tmp_path / "b.jsonl", [*(f"{text} ending" for text in originals[:9]), *map(str, range(30))])
    keys = {**SIZES, "near_duplicates": "remove"}
    corpus = prepared(texts := {"a": str(a), "b": str(b)}, **keys)
    assert corpus.manifests["b"].left_out == {"near_duplicate": 9}
    shutil.rmtree(corpus.path / "b")
    with pytest.raises(ShearingError, match=r"/b = 'made again, but [^$]*prepare all domains together into a new"):
        prepared(texts, **keys)
    assert not (corpus.path / "b").exists()
    # Another domain of that name is free to be what it is.
    assert prepared({"b": texts["b"]}, **SIZES).manifests["b"].left_out == {}


def test_an_index_of_an_earlier_version(prepared: Prepared, tmp_path: Path) -> None:
    texts = {name: str(write_lines(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(9)])) for name in "ab"}
    corpus = prepared(texts)
    before = content(corpus.path)
    index = json.loads(before["corpus.json"])
    del index["divided"]
    for damaged in (json.dumps(index), "{"):
        (corpus.path / "corpus.json").write_text(damaged)
        shutil.rmtree(corpus.path / "b")
        prepared(texts)
        assert content(corpus.path) == before
    assert not list(corpus.path.glob(f"{PREFIX}*"))
