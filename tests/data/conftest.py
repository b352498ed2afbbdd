from __future__ import annotations

from collections.abc import Callable

import pytest

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.writer import CorpusWriter


@pytest.fixture(scope="session")
def make_corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, int]], Corpus]:
    """Writes a corpus of so many 20-token documents per domain; domain k's tokens are 100 k + 1 … 100 k + 99."""

    def make(documents: dict[str, int]) -> Corpus:
        writer = CorpusWriter(
            tmp_path_factory.mktemp("corpus"),
            vocab_size=1000,
            separator_id=0,
            tokenizer="numbers",
            tokenizer_fingerprint="f",
            validation_fraction=0.15,
            test_fraction=0.15,
        )
        for k, (name, count) in enumerate(documents.items()):
            with writer.domain(name, sources=["made up"], inputs=name) as domain:
                for i in range(count):
                    domain.add(f"{name} {i}", token_ids=[100 * k + 1 + (i * 20 + j) % 99 for j in range(19)])
        return writer.finish()

    return make
