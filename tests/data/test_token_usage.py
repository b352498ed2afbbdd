"""Which tokens of a corpus are counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.writer import CorpusWriter
from shearing.data.token_usage import token_counts

SEPARATOR = 99


def test_text_that_judges_is_not_counted(tmp_path: Path) -> None:
    writer = CorpusWriter(
        tmp_path / "corpus",
        vocab_size=100,
        separator_id=SEPARATOR,
        tokenizer="numbers",
        tokenizer_fingerprint="numbers",
        validation_fraction=0.2,
        test_fraction=0.2,
    )
    with writer.domain("one", sources=["made here"], inputs="one") as domain:
        for number in range(40):
            domain.add(f"document {number}", token_ids=[number] * 3)
    writer.finish()
    corpus = Corpus.open(tmp_path / "corpus")
    counts = token_counts(corpus, vocab_size=100)
    read = [
        np.asarray(tokens.read(0, len(tokens)))
        for tokens in (corpus.tokens("one", split=split) for split in ("train", "validation"))
    ]
    np.testing.assert_array_equal(counts, np.bincount(np.concatenate(read), minlength=100))
    judged = corpus.tokens("one", split="test")
    only = set(np.asarray(judged.read(0, len(judged))).tolist()) - {SEPARATOR}
    assert len(only) > 3
    assert not counts[sorted(only)].any()
