"""What is too long for memory is read a part at a time, and the same comes out in whatever parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shearing.data import token_usage
from shearing.data.corpus import overlap, splits
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import SPLITS, text_hash
from shearing.data.token_usage import token_counts
from tests.data.corpus.test_splits import documents, tenths

MakeCorpus = Callable[[dict[str, int]], Corpus]


def _sides(_: MakeCorpus) -> Any:
    """Of two domains with texts in common, some of which are in the splits of an earlier one."""
    held = {split: documents(list(range(40 + 3 * place, 43 + 3 * place))).hashes for place, split in enumerate(SPLITS)}
    domains = {"a": documents(list(range(30, 60))), "b": documents(list(range(45, 90)))}
    chosen = splits.choose_splits(domains, sizes=tenths(), seed=0, earlier=splits.Earlier(**held))
    return {name: sides.tolist() for name, sides in chosen.items()}


def _shared(make_corpus: MakeCorpus) -> Any:
    outside, trained = make_corpus({"code": 9, "books": 30}), make_corpus({"books": 40})
    texts = {text_hash(f"books {number}".encode()) for number in range(30)}
    found = list(overlap.trained_texts(outside, trained=trained))
    count = len(texts.intersection(trained.document_hashes("books").tolist()))
    assert found == [overlap.Overlap(outside="books", trained="books", documents=count)]
    return found


def _counts(make_corpus: MakeCorpus) -> Any:
    return token_counts(make_corpus({"books": 30, "code": 40}), vocab_size=1000).tolist()


@pytest.mark.parametrize(
    ("module", "constant", "size", "found"),
    [
        (splits, "VALUES_AT_ONCE", 3, _sides),
        (overlap, "HASHES_AT_ONCE", 5, _shared),
        (token_usage, "_READ", 5, _counts),
    ],
    ids=["splits", "overlap", "token counts"],
)
def test_small_parts_give_what_one_gives(
    module: Any,
    constant: str,
    size: int,
    found: Callable[[MakeCorpus], Any],
    make_corpus: MakeCorpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = found(make_corpus)
    monkeypatch.setattr(module, constant, size)
    assert found(make_corpus) == expected
