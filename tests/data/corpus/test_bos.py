"""The token that begins a text: rows and labels against a plain walk over the documents; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from shearing.data.corpus.bos import Bos, BosChoice, require_bos, resolve_bos
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import SPLITS, Split
from shearing.data.corpus.writer import CorpusWriter
from shearing.data.documents import IGNORED_LABEL, DocumentRules
from shearing.data.mixture.prefetcher import Prefetcher
from shearing.data.mixture.sampler import Mixture
from shearing.errors import ShearingError
from shearing.objectives.teacher_cache.cache import domain_fingerprint

BEGIN, END = 1, 0
LENGTHS = (1, 2, 3, 7, 8, 15, 40)
MODES = ("none", "document", "row")
CPU = torch.device("cpu")


def bos_of(mode: str) -> Bos:
    return Bos(mode, None if mode == "none" else BEGIN)  # type: ignore[arg-type]


def write(path: Path, mode: str) -> Corpus:
    writer = CorpusWriter(
        path,
        vocab_size=50,
        separator_id=END,
        tokenizer="numbers",
        tokenizer_fingerprint="f",
        validation_fraction=0.15,
        test_fraction=0.15,
        bos=bos_of(mode),
    )
    for name, shift in (("first", 0), ("second", 3)):
        with writer.domain(name, sources=["made up"], inputs=name) as domain:
            for i in range(60):
                length = LENGTHS[(i + shift) % len(LENGTHS)]
                domain.add(f"{name} {i}", token_ids=[2 + (i + j) % 40 for j in range(length)])
    return writer.finish()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    """The same documents, begun in each of the ways."""
    return {mode: write(tmp_path_factory.mktemp(mode), mode) for mode in MODES}


def documents(corpus: Corpus, domain: str, split: Split = "train") -> list[list[int]]:
    tokens, ends = corpus.tokens(domain, split=split), corpus.document_ends(domain, split=split).tolist()
    everything = tokens.read(0, len(tokens)).tolist()
    return [everything[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def test_the_same_texts_lie_on_disk(corpora: dict[str, Corpus]) -> None:
    for domain in ("first", "second"):
        plain, begun, rows = (
            sorted(tokens for split in SPLITS for tokens in documents(corpora[mode], domain, split)) for mode in MODES
        )
        assert rows == plain
        assert begun == sorted([BEGIN, *tokens] for tokens in plain)
        assert len({corpora[mode].manifests[domain].bytes for mode in MODES}) == 1
    assert [corpora[mode].bos for mode in MODES] == [bos_of(mode) for mode in MODES]


@given(length=st.integers(2, 40))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_with_a_token_in_front_have_every_token_as_a_label_once(corpora: dict[str, Corpus], length: int) -> None:
    corpus = corpora["row"]
    for domain in corpus.domains:
        stream = [(token, place) for tokens in documents(corpus, domain) for place, token in enumerate(tokens)]
        rows = corpus.train_rows(domain, sequence_length=length)
        assert rows == len(stream) // length
        begin = 0
        for row in range(rows):
            here = stream[row * length : (row + 1) * length]
            found = corpus.row(domain, row, sequence_length=length).tolist()
            assert found == [BEGIN, *(token for token, _ in here)]
            expected, position = [0], 0
            for index, (_, place) in enumerate(here):
                # What a row begins with is of the same document as the token in front of it.
                position = 0 if place == 0 and index else position + 1
                expected.append(position)
            assert corpus.row_positions(domain, row, sequence_length=length).tolist() == expected
            begin += expected[1:].count(0)
        assert begin == corpus.labels_left_out(domain, np.arange(rows), sequence_length=length, loss_across=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("across", [True, False])
def test_the_token_is_never_a_label_that_counts(corpora: dict[str, Corpus], mode: str, across: bool) -> None:
    corpus = corpora[mode]
    mixture = Mixture(
        corpus,
        seed=1,
        sequence_length=9,
        weights={"first": 0.7, "second": 0.3},
        documents=DocumentRules(loss_across=across),
    )
    batch = mixture.batch(first_sample=0, num_sequences=60)
    of_rows = mixture.documents.documents(batch.positions, device=CPU)
    labels = batch.tokens[:, 1:] if of_rows is None else of_rows.labels(batch.tokens)
    counted = labels[labels != IGNORED_LABEL]
    assert not (counted == BEGIN).any()
    told = mixture.num_labels(first_sample=0, num_sequences=60)
    assert told in (None, len(counted))
    if across and mode != "document":
        assert len(counted) == batch.tokens[:, 1:].numel()
    if mode == "document":
        # All else counts: what follows the token begins a text and is predicted from it.
        assert len(counted) == int((batch.tokens[:, 1:] != BEGIN).sum())


@pytest.mark.parametrize("mode", MODES)
def test_a_mixture_that_is_resumed_goes_on_with_the_same_rows(corpora: dict[str, Corpus], mode: str) -> None:
    def mixture() -> Mixture:
        return Mixture(corpora[mode], seed=5, sequence_length=8, weights={"first": 0.5, "second": 0.5})

    whole = mixture()
    expected = torch.cat([whole.batch(first_sample=first, num_sequences=4).tokens for first in range(0, 40, 4)])
    before = mixture()
    before.batch(first_sample=0, num_sequences=20)
    after = mixture()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    parts = [after.batch(first_sample=first, num_sequences=2).tokens for first in range(20, 40, 2)]
    assert torch.equal(torch.cat(parts), expected[20:])
    for other in set(MODES) - {mode}:
        another = Mixture(corpora[other], seed=5, sequence_length=8, weights={"first": 0.5, "second": 0.5})
        with pytest.raises(ShearingError, match="mixture state: corpus"):
            another.load_state_dict(before.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_processes_share_the_rows_out(corpora: dict[str, Corpus], mode: str) -> None:
    def mixture() -> Mixture:
        return Mixture(corpora[mode], seed=5, sequence_length=8, weights={"first": 0.5, "second": 0.5})

    whole = mixture().batch(first_sample=0, num_sequences=12)
    parts = []
    for rank in range(3):
        with Prefetcher(mixture(), sequences_per_step=12, rank=rank, world_size=3) as prefetcher:
            parts.append(prefetcher.next())
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert {part.num_labels for part in parts} == {mixture().num_labels(first_sample=0, num_sequences=12)}


def test_fingerprints_tell_the_ways_apart(corpora: dict[str, Corpus]) -> None:
    assert len({corpus.fingerprint for corpus in corpora.values()}) == len(MODES)
    assert len({domain_fingerprint(corpus.manifests["first"]) for corpus in corpora.values()}) == len(MODES)


def test_a_corpus_of_an_earlier_version_has_no_token_in_front(tmp_path: Path) -> None:
    corpus = write(tmp_path, "none")
    for path in tmp_path.glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        for name in ("bos_mode", "bos_id"):
            del manifest[name]
        path.write_text(json.dumps(manifest))
    opened = Corpus.open(tmp_path)
    assert opened.bos == Bos()
    assert opened.fingerprint == corpus.fingerprint


def test_domains_that_begin_in_different_ways_are_not_opened_together(tmp_path: Path) -> None:
    write(tmp_path, "row")
    path = tmp_path / "second" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_mode": "none", "bos_id": None}))
    with pytest.raises(ShearingError, match="first: token 1 in front of each row, second: no token in front"):
        Corpus.open(tmp_path)
    assert Corpus.open(tmp_path, domains=["second"]).bos == Bos()


def test_held_out_rows_say_whether_a_document_begins_with_them(corpora: dict[str, Corpus]) -> None:
    corpus, length = corpora["row"], 3
    how: dict[str, Any] = {"split": "test", "sequence_length": length, "tokens": 10_000, "micro_batch_size": 4}
    for domain in corpus.domains:
        places = [place for tokens in documents(corpus, domain, "test") for place in range(len(tokens))]
        count = corpus.heldout_rows(domain, split="test", sequence_length=length)
        found = torch.cat(list(corpus.heldout_begins(domain, **how))).tolist()
        assert found == [places[row * length] == 0 for row in range(count)]
        assert 0 < sum(found) < count


@pytest.mark.parametrize(
    ("choice", "front", "named", "expected"),
    [
        ("auto", 1, 1, Bos("document", 1)),
        ("auto", None, 1, Bos()),
        ("none", 1, 1, Bos()),
        ("document", None, 1, Bos("document", 1)),
        ("row", 1, 2, Bos("row", 1)),
    ],
)
def test_what_a_choice_means(choice: BosChoice, front: int | None, named: int | None, expected: Bos) -> None:
    assert resolve_bos(choice, front=front, named=named) == expected


def test_a_tokenizer_without_such_a_token_cannot_put_it() -> None:
    with pytest.raises(ShearingError, match="set bos=none"):
        resolve_bos("row", front=None, named=None)


NONE, DOCUMENT, ROW = Bos(), Bos("document", 1), Bos("row", 1)


@pytest.mark.parametrize(
    ("found", "choice", "front", "mend"),
    [
        (NONE, "auto", None, None),
        (DOCUMENT, "auto", 1, None),
        (ROW, "auto", 1, None),
        (NONE, "none", 1, None),
        (ROW, "row", None, None),
        (NONE, "auto", 1, "prepare the text again with bos=auto, or set bos=none to take the corpus as it is"),
        (DOCUMENT, "auto", None, "prepare the text again with bos=auto, or set bos=document"),
        (DOCUMENT, "row", 1, "prepare the text again with bos=row, or set bos=document"),
        (ROW, "none", 1, "prepare the text again with bos=none, or set bos=row"),
        (replace(DOCUMENT, token=7), "auto", 1, "prepare the text again with bos=auto"),
    ],
)
def test_a_corpus_that_begins_otherwise_than_its_model_is_refused(
    found: Bos, choice: BosChoice, front: int | None, mend: str | None
) -> None:
    def check() -> None:
        require_bos(found, choice=choice, front=front, named=1, corpus="my/corpus")

    if mend is None:
        check()
        return
    with pytest.raises(ShearingError) as raised:
        check()
    assert raised.value.mend.startswith(mend)
    assert ("or set" in raised.value.mend) == ("or set" in mend)
