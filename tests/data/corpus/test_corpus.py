from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from shearing.data.corpus import domain_folder, shards
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import HELD_OUT, SPLITS, HeldOutSplit, tokenizer_fingerprint
from shearing.data.corpus.writer import CorpusWriter
from shearing.errors import ShearingError

SMALL = {"books": 30, "code": 40}


def writer(path: Path, **changes: object) -> CorpusWriter:
    settings = {"vocab_size": 1000, "separator_id": 0, "tokenizer": "t", "tokenizer_fingerprint": "f"} | changes
    return CorpusWriter(path, **settings)  # type: ignore[arg-type]


def split_texts(corpus: Corpus, domain: str, texts: dict[tuple[int, ...], str]) -> dict[str, list[str]]:
    """The documents of each split, found again by their tokens."""
    found = {}
    for split in SPLITS:
        tokens = np.fromfile(corpus.path / domain / f"{split}.bin", dtype=corpus.manifests[domain].dtype)
        ends = corpus.document_ends(domain, split=split).tolist()
        starts = [0, *ends[:-1]]
        assert all(tokens[end - 1] == 0 for end in ends)
        found[split] = [texts[tuple(tokens[a : b - 1].tolist())] for a, b in zip(starts, ends, strict=True)]
    return found


def in_small_parts(patch: pytest.MonkeyPatch) -> None:
    """Let domains be read and written a few documents at a time."""
    patch.setattr(shards, "DOCUMENTS_PER_READ", 7)
    patch.setattr(domain_folder, "TOKENS_PER_WRITE", 9)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.lists(st.integers(0, 60), min_size=3, max_size=80).filter(lambda n: len(set(n)) > 2),
    vocab_size=st.sampled_from([1000, 65_536, 65_537]),
    small_parts=st.booleans(),
)
def test_round_trip_without_leaks(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], vocab_size: int, small_parts: bool
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    documents = [(f"document {n}", (*(1 + (n * 7 + j) % 900 for j in range(1 + n % 5)), n + 1)) for n in numbers]
    out = writer(folder, vocab_size=vocab_size, validation_fraction=0.15, test_fraction=0.15)
    with pytest.MonkeyPatch.context() as patch:
        if small_parts:
            in_small_parts(patch)
        with out.domain("d", sources=["s"], inputs="i") as domain:
            for text, tokens in documents:
                domain.add(text, token_ids=tokens)
    corpus = out.finish()
    found = split_texts(corpus, "d", {tokens: text for text, tokens in documents})
    assert sorted(chain(*found.values())) == sorted(text for text, _ in documents)
    assert all(found.values())
    assert sum(len(set(each)) for each in found.values()) == len({text for text, _ in documents})
    manifest = corpus.manifests["d"]
    assert manifest.dtype == ("uint16" if vocab_size <= 65_536 else "uint32")
    for split in SPLITS:
        counts = manifest.parts[split]
        assert counts.documents == len(found[split])
        assert counts.bytes == sum(len(text.encode()) for text in found[split])
        assert counts.tokens == corpus.document_ends("d", split=split)[-1]
    assert manifest.largest_token == max(max(tokens) for _, tokens in documents)


def test_rows_tile_the_tokens(make_corpus) -> None:
    corpus = make_corpus(SMALL)
    tokens = np.fromfile(corpus.path / "books" / "train.bin", dtype=np.uint16)
    rows = corpus.train_rows("books", sequence_length=7)
    assert rows == (len(tokens) - 1) // 7
    for i in range(rows):
        row = corpus.row("books", i, sequence_length=7)
        assert row.dtype == np.int64
        assert row.tolist() == tokens[7 * i : 7 * i + 8].tolist()
    for outside in (rows, -1):
        with pytest.raises(IndexError):
            corpus.row("books", outside, sequence_length=7)


def test_heldout_batches_are_fixed_and_spread(make_corpus) -> None:
    corpus = make_corpus(SMALL)
    how: Any = {"split": "test", "sequence_length": 8}
    rows = corpus.heldout_rows("code", split="test", sequence_length=8)

    def read(tokens: int) -> list[list[int]]:
        batches = list(corpus.heldout_batches("code", **how, tokens=tokens, micro_batch_size=2))
        assert all(batch.shape[0] == 2 for batch in batches[:-1])
        return [row for batch in batches for row in batch.tolist()]

    everything = [corpus.row("code", i, sequence_length=8, split="test").tolist() for i in range(rows)]
    assert read(10**9) == everything
    assert read(1) == everything[:1]
    assert read(3 * 8) == [everything[i * rows // 3] for i in range(3)] == read(3 * 8)


@pytest.mark.parametrize("tokens", [1, 8, 3 * 8, 3 * 8 + 7, 10**9])
@pytest.mark.parametrize("split", HELD_OUT)
def test_heldout_tokens_are_the_inputs_of_what_is_read(make_corpus, tokens: int, split: HeldOutSplit) -> None:
    corpus = make_corpus(SMALL)
    read = sum(
        batch[:, 1:].numel()
        for domain in corpus.domains
        for batch in corpus.heldout_batches(domain, split=split, sequence_length=8, tokens=tokens, micro_batch_size=2)
    )
    assert corpus.heldout_tokens(split=split, sequence_length=8, tokens_per_domain=tokens) == read


def test_fingerprint_is_of_the_content_not_the_place(make_corpus) -> None:
    one, same, other = make_corpus(SMALL), make_corpus(SMALL), make_corpus({"books": 30, "code": 41})
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint
    # A domain prepared later must not disturb a run over the others.
    assert (
        Corpus.open(other.path, domains=["books"]).fingerprint == Corpus.open(one.path, domains=["books"]).fingerprint
    )


def test_open_errors(make_corpus, tmp_path: Path) -> None:
    corpus = make_corpus(SMALL)
    with pytest.raises(ShearingError, match="prepare it"):
        Corpus.open(tmp_path / "nowhere")
    with pytest.raises(ShearingError, match="did you mean books"):
        Corpus.open(corpus.path, domains=["boks"])
    with pytest.raises(ShearingError, match="at least one of"):
        Corpus.open(corpus.path, domains=[])
    with pytest.raises(ShearingError, match="token ids below"):
        Corpus.open(corpus.path, vocab_size=100)
    with pytest.raises(ShearingError, match="the model's own tokenizer"):
        Corpus.open(corpus.path, tokenizer_fingerprint="another")
    with pytest.raises(ShearingError, match="shorter sequence"):
        Corpus.open(corpus.path, sequence_length=10_000)
    assert Corpus.open(corpus.path, vocab_size=1000, tokenizer_fingerprint="f", sequence_length=8).domains == list(
        SMALL
    )


def test_interrupted_and_damaged_corpora_are_refused(make_corpus) -> None:
    corpus = make_corpus(SMALL)
    index = (corpus.path / "corpus.json").read_text()
    (corpus.path / "corpus.json").unlink()
    with pytest.raises(ShearingError, match="continues where it was"):
        Corpus.open(corpus.path)
    (corpus.path / "corpus.json").write_text(index.replace('"format": 3', '"format": 99'))
    with pytest.raises(ShearingError, match="format 99"):
        Corpus.open(corpus.path)
    (corpus.path / "corpus.json").write_text("{")
    with pytest.raises(ShearingError, match="index"):
        Corpus.open(corpus.path)
    (corpus.path / "corpus.json").write_text(index)
    tokens = corpus.path / "books" / "train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(ShearingError, match="damaged"):
        Corpus.open(corpus.path)
    manifest = corpus.path / "code" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["parts"]["test"]["tokens"] = 0
    manifest.write_text(json.dumps(values))
    with pytest.raises(ShearingError, match="0 tokens in test"):
        Corpus.open(corpus.path, domains=["code"])
    manifest.unlink()
    with pytest.raises(ShearingError, match="manifest of a prepared domain"):
        Corpus.open(corpus.path, domains=["code"])


def test_an_interrupted_domain_leaves_nothing_and_can_be_written_again(tmp_path: Path) -> None:
    out = writer(tmp_path)

    def interrupted() -> None:
        with out.domain("d", sources=[], inputs="i") as domain:
            domain.add("text", token_ids=[1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".partial-d").mkdir()  # what a kill leaves
    out = writer(tmp_path)
    with out.domain("d", sources=[], inputs="i") as domain:
        domain.add("a", token_ids=[1])
        domain.add("b", token_ids=[2])
        domain.add("c", token_ids=[3])
    assert out.is_complete("d", inputs="i")
    with pytest.raises(ShearingError, match="other settings"):
        out.is_complete("d", inputs="j")
    with pytest.raises(ShearingError, match="other settings"):
        writer(tmp_path, tokenizer_fingerprint="g").is_complete("d", inputs="i")


@pytest.mark.parametrize("token", [1000, -1])
def test_token_ids_outside_the_vocabulary_are_refused(tmp_path: Path, token: int) -> None:
    with pytest.raises(ShearingError, match="0 to 999"), writer(tmp_path).domain("d", sources=[], inputs="") as domain:
        domain.add("text", token_ids=[3, token])
    assert list(tmp_path.iterdir()) == []


def test_two_distinct_documents_cannot_be_split(tmp_path: Path) -> None:
    def write() -> None:
        with writer(tmp_path).domain("d", sources=[], inputs="") as domain:
            domain.add("same", token_ids=[1])
            domain.add("same", token_ids=[1])
            domain.add("other", token_ids=[1])

    with pytest.raises(ShearingError, match="at least 3 different documents"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_writer_arguments(tmp_path: Path) -> None:
    with pytest.raises(ShearingError, match="validation_fraction"):
        writer(tmp_path, validation_fraction=1.0)
    with pytest.raises(ShearingError, match="below 1 together"):
        writer(tmp_path, validation_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ShearingError, match="letters, digits"):
        writer(tmp_path).domain("../d", sources=[], inputs="")
    with pytest.raises(ShearingError, match="no domain"):
        writer(tmp_path).finish()
    (tmp_path / "file").touch()
    with pytest.raises(ShearingError, match="can be written"):
        writer(tmp_path / "file")


def test_a_folder_of_raw_text_is_no_interrupted_corpus(tmp_path: Path) -> None:
    (tmp_path / "prose").mkdir()
    with pytest.raises(ShearingError, match=rf"^corpus = '{tmp_path}'(.|\n)*prepare --domain NAME={tmp_path} .* -o"):
        Corpus.open(tmp_path)
    (tmp_path / ".preparing-0").mkdir()
    with pytest.raises(ShearingError, match=rf"^corpus = '{tmp_path}'(.|\n)*continues where it was"):
        Corpus.open(tmp_path)


def test_tokenizer_fingerprint_notices_vocabulary_and_splitting() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    def build(*, digits: bool, last: str = "z") -> object:
        vocabulary = {token: i for i, token in enumerate(["?", *"abcdefghijklmnopqrstuvwxy0123456789", "12", last])}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("1", "2")], unk_token="?"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Digits(individual_digits=digits)
        return tokenizer

    plain = tokenizer_fingerprint(build(digits=False))
    assert plain == tokenizer_fingerprint(build(digits=False))
    assert plain != tokenizer_fingerprint(build(digits=True))
    assert plain != tokenizer_fingerprint(build(digits=False, last="Z"))
    assert plain == tokenizer_fingerprint(PreTrainedTokenizerFast(tokenizer_object=build(digits=False)))
