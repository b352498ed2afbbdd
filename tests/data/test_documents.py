"""Where documents begin in rows, against a walk over every token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.writer import CorpusWriter
from shearing.data.documents import DocumentRules, Inputs
from shearing.data.mixture.prefetcher import Prefetcher
from shearing.data.mixture.sampler import Mixture

LENGTHS = (1, 2, 3, 5, 30, 1, 1, 8)
BOTH = DocumentRules(attention_within=True, loss_across=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two domains of documents of very different lengths; the separator, 0, is also inside texts."""
    writer = CorpusWriter(
        tmp_path_factory.mktemp("corpus"),
        vocab_size=50,
        separator_id=0,
        tokenizer="numbers",
        tokenizer_fingerprint="f",
        validation_fraction=0.15,
        test_fraction=0.15,
    )
    for name, shift in (("first", 0), ("second", 3)):
        with writer.domain(name, sources=["made up"], inputs=name) as domain:
            for i in range(120):
                length = LENGTHS[(i + shift) % len(LENGTHS)]
                domain.add(f"{name} {i}", token_ids=[(i + j) % 5 for j in range(length)])
    return writer.finish()


def walked(corpus: Corpus, domain: str, *, row: int, length: int, split: str = "train") -> list[int]:
    """Positions of one row, token by token."""
    ends = set(corpus.document_ends(domain, split=split).tolist())  # type: ignore[arg-type]
    positions, position = [], 0
    for place in range(row * length, (row + 1) * length + 1):
        position = 0 if place in ends or place == row * length else position + 1
        positions.append(position)
    return positions


@given(length=st.integers(2, 40))
@settings(max_examples=20)
def test_positions_count_from_the_document_or_the_row(corpus: Corpus, length: int) -> None:
    for domain in corpus.domains:
        rows = corpus.train_rows(domain, sequence_length=length)
        begin = 0
        for row in range(rows):
            found = corpus.row_positions(domain, row, sequence_length=length)
            assert found.tolist() == walked(corpus, domain, row=row, length=length)
            begin += int((found[1:] == 0).sum())
        found = corpus.labels_left_out(domain, np.arange(rows), sequence_length=length, loss_across=False)
        assert begin == found


def test_held_out_rows_come_with_their_positions(corpus: Corpus) -> None:
    how = {"split": "test", "sequence_length": 7, "tokens": 70, "micro_batch_size": 3}
    for domain in corpus.domains:
        count = corpus.heldout_rows(domain, split="test", sequence_length=7)
        chosen = [i * count // min(count, 10) for i in range(min(count, 10))]
        expected = [walked(corpus, domain, row=row, length=7, split="test") for row in chosen]
        batches = list(corpus.heldout_positions(domain, **how))
        assert [len(batch) for batch in batches] == [len(batch) for batch in corpus.heldout_batches(domain, **how)]
        assert torch.cat(batches).tolist() == expected


def mixture(corpus: Corpus, rules: DocumentRules | None) -> Mixture:
    return Mixture(corpus, seed=1, sequence_length=9, weights={"first": 0.7, "second": 0.3}, documents=rules)


def test_every_process_knows_the_labels_of_the_whole_step(corpus: Corpus) -> None:
    whole = mixture(corpus, BOTH)
    steps = [whole.batch(first_sample=12 * step, num_sequences=12) for step in range(4)]
    for size in (1, 2, 3):
        parts = []
        for rank in range(size):
            with Prefetcher(mixture(corpus, BOTH), sequences_per_step=12, rank=rank, world_size=size) as prefetcher:
                parts.append([prefetcher.next() for _ in range(4)])
        for step, batch in enumerate(steps):
            own = [part[step] for part in parts]
            assert torch.equal(torch.cat([part.tokens for part in own]), batch.tokens)
            positions = [part.positions for part in own if part.positions is not None]
            assert batch.positions is not None
            assert torch.equal(torch.cat(positions), batch.positions)
            assert {part.num_labels for part in own} == {int((batch.positions[:, 1:] != 0).sum())}


def test_nothing_is_said_of_documents_that_nobody_asked_for(corpus: Corpus) -> None:
    plain, within = mixture(corpus, None), mixture(corpus, DocumentRules(attention_within=True))
    assert plain.batch(first_sample=0, num_sequences=3).positions is None
    assert plain.num_labels(first_sample=0, num_sequences=3) is None
    assert within.num_labels(first_sample=0, num_sequences=3) is None
    assert torch.equal(
        plain.batch(first_sample=0, num_sequences=30).tokens, within.batch(first_sample=0, num_sequences=30).tokens
    )


@pytest.mark.parametrize("rules", [BOTH, DocumentRules(attention_within=True), DocumentRules(loss_across=False)])
def test_rows_by_themselves_have_the_documents_that_they_have_among_others(rules: DocumentRules) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1, 2], [5, 6, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    tokens, device = torch.arange(24).view(3, 8), torch.device("cpu")
    inputs = Inputs(tokens, rules.documents(positions, device=device))
    assert inputs.part(0, 3) is inputs
    assert len(inputs.rows()) == 3
    parts = {(row, row + 1): part for row, part in enumerate(inputs.rows())}
    for (first, end), found in {**parts, (0, 2): inputs.part(0, 2), (1, 3): inputs.part(1, 3)}.items():
        assert torch.equal(found.tokens, tokens[first:end])
        documents, alone = found.documents, rules.documents(positions[first:end], device=device)
        assert documents is not None
        for name in ("position_ids", "boundaries", "boundaries_on_device", "left_out"):
            mine, wanted = getattr(documents, name), getattr(alone, name)
            assert (mine is None and wanted is None) or torch.equal(mine, wanted), name
    assert [row.documents for row in Inputs(tokens).rows()] == [None] * 3
