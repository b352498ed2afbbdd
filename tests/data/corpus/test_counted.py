"""Tokens that do not count: bits beside the tokens, read wherever a row begins, and told where they are damaged."""

from __future__ import annotations

import hashlib
import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from rich.console import Console

from data_tools.inspection.verification import verify
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.counted import BitsWriter, Counted, counted_path
from shearing.data.corpus.domain_folder import DomainSettings, Place, write_domain_folder
from shearing.data.corpus.format import SPLITS
from shearing.data.corpus.shards import ShardWriter
from shearing.data.corpus.splits import SplitSize, SplitSizes
from shearing.data.documents import IGNORED_LABEL, DocumentRules
from shearing.data.mixture.prefetcher import Prefetcher
from shearing.data.mixture.sampler import Mixture
from shearing.errors import ShearingError
from tests.data.corpus.answers import with_answers
from tests.data.corpus.test_corpus import in_small_parts

RULES = [DocumentRules(), DocumentRules(loss_across=False), DocumentRules(attention_within=True, loss_across=False)]
LENGTH = 13


@pytest.fixture
def corpus(tiny_inputs: Path, tmp_path: Path) -> Corpus:
    """Two domains; of the tokens of `letters` some do not count."""
    return Corpus.open(with_answers(tiny_inputs / "corpus", tmp_path / "corpus", domain="letters"))


@given(st.lists(st.lists(st.booleans(), max_size=30), max_size=8), st.data())
def test_bits_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[list[bool]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("bits") / "train_counted.bin"
    writer = BitsWriter(path)
    for piece in pieces:
        writer.write(np.array(piece, dtype=np.bool_))
    bits = [bit for piece in pieces for bit in piece]
    assert writer.count == sum(bits)
    assert writer.close() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stat().st_size == -(-len(bits) // 8)
    if bits:
        start = data.draw(st.integers(0, len(bits)))
        stop = data.draw(st.integers(start, len(bits)))
        assert Counted(path).read(start, stop).tolist() == bits[start:stop]


def bits_of(corpus: Corpus, domain: str, split: str) -> np.ndarray:
    """Of each token whether it counts, without our reader."""
    tokens = corpus.manifests[domain].parts[split].tokens
    if domain != "letters":
        return np.ones(tokens, dtype=bool)
    return np.unpackbits(np.fromfile(counted_path(corpus.path / domain, split), np.uint8), count=tokens).astype(bool)


def test_rows_come_with_what_counts(corpus: Corpus) -> None:
    for split in SPLITS:
        for domain in corpus.domains:
            bits = bits_of(corpus, domain, split)
            rows = (len(bits) - 1) // LENGTH
            found = corpus.counted([(domain, row) for row in range(rows)], sequence_length=LENGTH, split=split)
            assert found is not None
            expected = [bits[row * LENGTH : (row + 1) * LENGTH + 1] for row in range(rows)]
            assert np.array_equal(found, np.array(expected))
    how = {"split": "test", "sequence_length": LENGTH, "tokens": 70, "micro_batch_size": 2}
    for domain in corpus.domains:
        batches = list(corpus.heldout_counted(domain, **how))  # type: ignore[arg-type]
        assert [len(each) for each in batches if each is not None] == [
            len(each)
            for each in corpus.heldout_batches(domain, **how)  # type: ignore[arg-type]
        ]


def test_behind_a_token_in_front_of_each_row_the_bits_are_those_of_the_text(corpus: Corpus) -> None:
    for domain in corpus.domains:
        path = corpus.path / domain / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "bos_mode": "row", "bos_id": 1}))
    begun = Corpus.open(corpus.path)
    bits = bits_of(begun, "letters", "train")
    rows = begun.train_rows("letters", sequence_length=LENGTH)
    found = begun.counted([("letters", row) for row in range(rows)], sequence_length=LENGTH)
    assert found is not None
    assert np.array_equal(found[:, 1:], bits[: rows * LENGTH].reshape(rows, LENGTH))
    left_out = begun.labels_left_out("letters", np.arange(rows), sequence_length=LENGTH, loss_across=True)
    assert left_out == int((~bits[: rows * LENGTH]).sum())


def test_what_begins_with_the_token_gets_no_second_and_bits_move_along(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, vocab_size=9, separator_id=0, begin_id=1, counted=True)
    # The second is as a chat template writes it.
    counted = [np.array([True, False]), np.array([False, False, True]), np.array([], dtype=np.bool_)]
    writer.add([b"a", b"b", b""], token_ids=[[5, 6], [1, 7, 8], []], counted=counted)
    shard = writer.close(sources=[], left_out={})
    assert shard.read_tokens(0, 10, dtype=writer.dtype).tolist() == [1, 5, 6, 0, 1, 7, 8, 0, 1, 0]
    assert shard.read_counted(0, 10).tolist() == [False, True, False, False, False, False, True, True, False, False]


def test_a_domain_is_the_same_in_whatever_parts_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    shards = []
    for number, documents in enumerate((30, 17)):
        (tmp_path / f"shard-{number}").mkdir()
        writer = ShardWriter(tmp_path / f"shard-{number}", vocab_size=99, separator_id=0, counted=True)
        for index in range(documents):
            ids = draw.integers(1, 99, draw.integers(1, 9))
            writer.add([f"{number} {index}".encode()], token_ids=[ids.tolist()], counted=[ids % 3 == 0])
        shards.append(writer.close(sources=[], left_out={}))
    places = draw.choice([*Place], 47).astype(np.uint8)
    settings = DomainSettings(
        vocab_size=99,
        separator_id=0,
        tokenizer="numbers",
        tokenizer_fingerprint="numbers",
        split_seed=0,
        sizes=SplitSizes(*[SplitSize.parse("5%")] * 2),
        versions={},
    )

    def write(folder: Path) -> dict[str, bytes]:
        folder.mkdir()
        write_domain_folder(folder, name="d", shards=shards, places=places, settings=settings, inputs="i")
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    whole = write(tmp_path / "whole")
    in_small_parts(monkeypatch)
    assert write(tmp_path / "parts") == whole
    for split in SPLITS:
        tokens = np.frombuffer(whole[f"{split}.bin"], np.uint16)
        bits = np.unpackbits(np.frombuffer(whole[counted_path(tmp_path, split).name], np.uint8), count=len(tokens))
        assert np.array_equal(bits[tokens != 0], tokens[tokens != 0] % 3 == 0)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_every_process_knows_the_labels_of_the_whole_step(corpus: Corpus, rules: DocumentRules) -> None:
    def mixture() -> Mixture:
        weights = {"letters": 0.7, "digits": 0.3}
        return Mixture(corpus, seed=1, sequence_length=LENGTH, weights=weights, documents=rules)

    for size in (1, 2):
        labels = [0, 0, 0]
        told: list[set[int | None]] = [set(), set(), set()]
        for rank in range(size):
            with Prefetcher(mixture(), sequences_per_step=8, rank=rank, world_size=size) as prefetcher:
                for step in range(3):
                    batch = prefetcher.next()
                    documents = rules.documents(batch.positions, device=torch.device("cpu"), counted_BT=batch.counted)
                    assert documents is not None
                    labels[step] += int((documents.labels(batch.tokens) != IGNORED_LABEL).sum())
                    told[step].add(batch.num_labels)
        assert told == [{count} for count in labels]
        assert all(0 < count < 8 * LENGTH for count in labels)


def test_a_corpus_of_which_all_counts_is_as_it_was(tiny_inputs: Path, corpus: Corpus) -> None:
    plain = Corpus.open(tiny_inputs / "corpus")
    assert plain.all_count
    assert not corpus.all_count
    assert plain.counted([("letters", 0)], sequence_length=4) is None
    manifest = json.loads((plain.path / "letters" / "manifest.json").read_text())
    assert "counted" not in manifest["parts"]["train"]
    assert manifest == json.loads(json.dumps(plain.manifests["letters"].to_json()))
    assert plain.fingerprint != corpus.fingerprint
    assert plain.only(["digits"]).fingerprint == corpus.only(["digits"]).fingerprint
    assert corpus.only(["digits"]).all_count


def test_damages(corpus: Corpus) -> None:
    def damaged() -> list[str]:
        return [
            damage.file
            for damage in verify(corpus.path, sources=False, rows=2, seed=0, console=Console(file=StringIO())).damages
        ]

    assert damaged() == []
    file = counted_path(corpus.path / "letters", "train")
    content = bytearray(file.read_bytes())
    content[5] ^= 4
    file.write_bytes(content)
    assert damaged() == [str(file)]
    file.write_bytes(content[:-1])
    with pytest.raises(ShearingError, match="a bit for each token"):
        Corpus.open(corpus.path)
    file.unlink()
    with pytest.raises(ShearingError, match="missing"):
        Corpus.open(corpus.path)


def test_a_domain_of_which_nothing_counts(tiny_inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ShearingError, match="no token in train that counts in a loss"):
        with_answers(tiny_inputs / "corpus", tmp_path / "none", domain="letters", share=0.0)
