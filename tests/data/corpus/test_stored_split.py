"""Corpora of format 2, with one held-out part: its first half of documents steers, its second half judges."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.domain_folder import earlier_texts
from shearing.data.corpus.format import HELD_OUT, SPLITS, HeldOutSplit
from shearing.errors import ShearingError


def as_format_2(corpus: Path) -> Path:
    """Change a corpus in place to what was written before: what is held out lies in one part."""
    for folder in (path.parent for path in corpus.glob("*/manifest.json")):
        values = json.loads((folder / "manifest.json").read_text())
        parts, dtype = values.pop("parts"), values["dtype"]
        tokens = np.concatenate([np.fromfile(folder / f"{split}.bin", dtype=dtype) for split in HELD_OUT])
        ends = [np.load(folder / f"{split}_ends.npy") for split in HELD_OUT]
        hashes = np.concatenate([np.load(folder / f"{split}_hashes.npy") for split in HELD_OUT])
        tokens.tofile(folder / "heldout.bin")
        np.save(folder / "heldout_ends.npy", np.concatenate([ends[0], ends[1] + ends[0][-1]]))
        np.save(folder / "heldout_hashes.npy", hashes)
        counts = {name: sum(parts[split][name] for split in HELD_OUT) for name in ("documents", "tokens", "bytes")}
        for key, file in (("sha256", ".bin"), ("ends_sha256", "_ends.npy"), ("hashes_sha256", "_hashes.npy")):
            counts[key] = hashlib.sha256((folder / f"heldout{file}").read_bytes()).hexdigest()
            for split in HELD_OUT:
                (folder / f"{split}{file}").unlink()
        del values["sizes"]
        values |= {"train": parts["train"], "heldout": counts, "heldout_size": "10%"}
        (folder / "manifest.json").write_text(json.dumps(values))
    index = json.loads((corpus / "corpus.json").read_text())
    (corpus / "corpus.json").write_text(json.dumps({**index, "format": 2}))
    return corpus


def documents(corpus: Corpus, domain: str, split: HeldOutSplit) -> list[list[int]]:
    tokens, ends = corpus.tokens(domain, split=split), corpus.document_ends(domain, split=split).tolist()
    everything = tokens.read(0, 10**9).tolist()
    assert len(everything) == len(tokens) == ends[-1] == corpus.split_tokens(domain, split)
    assert len(corpus.document_hashes(domain, split=split)) == len(ends)
    return [everything[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def test_an_old_corpus_opens_and_its_halves_share_no_document(make_corpus: Callable[..., Corpus]) -> None:
    new = make_corpus({"books": 30, "code": 40})
    before = {name: [each for split in HELD_OUT for each in documents(new, name, split)] for name in new.domains}
    rows = [new.row("code", i, sequence_length=7).tolist() for i in range(3)]
    old = Corpus.open(as_format_2(new.path), sequence_length=8)
    assert old.of_one_part == ["books", "code"]
    assert old.notice is not None
    assert "the first half of its documents steers" in old.notice
    assert old.named_split("test") == "held-out (second half)"
    assert [old.row("code", i, sequence_length=7).tolist() for i in range(3)] == rows
    for name in old.domains:
        validation, test = (documents(old, name, split) for split in HELD_OUT)
        assert validation + test == before[name]
        assert abs(len(validation) - len(test)) <= 1
        flat = [token for each in test for token in each]
        row = old.row(name, 1, sequence_length=5, split="test")
        assert row.tolist() == flat[5:11]
        count = old.heldout_rows(name, split="test", sequence_length=8)
        how = {"split": "test", "sequence_length": 8, "tokens": 10**6, "micro_batch_size": 100}
        [batch], [positions] = old.heldout_batches(name, **how), old.heldout_positions(name, **how)  # type: ignore[arg-type]
        assert batch.tolist() == [flat[i * 8 : i * 8 + 9] for i in range(count)]
        assert [(row == 0).sum() for row in positions] == [
            1 + sum(token == 0 for token in flat[i * 8 : i * 8 + 8]) for i in range(count)
        ]
        with pytest.raises(IndexError):
            old.row(name, count, sequence_length=8, split="test")


def test_a_new_corpus_says_nothing(make_corpus: Callable[..., Corpus]) -> None:
    corpus = make_corpus({"books": 30})
    assert corpus.notice is None
    assert corpus.named_split("test") == "test"


def test_what_an_old_domain_holds_out_is_known_to_new_ones(make_corpus: Callable[..., Corpus]) -> None:
    old = Corpus.open(as_format_2(make_corpus({"books": 30}).path))
    earlier = earlier_texts(old.path)
    for split in SPLITS:
        assert set(getattr(earlier, split).tolist()) == set(old.document_hashes("books", split=split).tolist())


def test_one_held_out_document_cannot_do_both(make_corpus: Callable[..., Corpus]) -> None:
    path = as_format_2(make_corpus({"books": 30}).path) / "books"
    values = json.loads((path / "manifest.json").read_text())
    np.save(path / "heldout_ends.npy", np.array([values["heldout"]["tokens"]]))
    np.save(path / "heldout_hashes.npy", np.array([1], dtype=np.uint64))
    for name in ("ends", "hashes"):
        values["heldout"][f"{name}_sha256"] = hashlib.sha256((path / f"heldout_{name}.npy").read_bytes()).hexdigest()
    values["heldout"]["documents"] = 1
    (path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ShearingError, match="cannot both steer and judge"):
        Corpus.open(path.parent)
