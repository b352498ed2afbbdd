from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner

from data_tools.adoption.adoption import adopt
from data_tools.inspection.verification import Verification, verify
from shearing.cli.frame import app
from shearing.data.corpus import integrity
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.data.corpus.writer import CorpusWriter
from shearing.errors import ShearingError


@pytest.fixture
def corpus(tmp_path: Path, byte_tokenizer: Path) -> Path:
    """Two domains of the same numbers of documents and tokens, so that sizes do not tell them apart."""
    loaded = AutoTokenizer.from_pretrained(byte_tokenizer)
    backend = loaded.backend_tokenizer
    writer = CorpusWriter(
        tmp_path / "corpus",
        vocab_size=257,
        separator_id=0,
        tokenizer="bytes",
        tokenizer_fingerprint=tokenizer_fingerprint(backend),
        validation_fraction=0.15,
        test_fraction=0.15,
    )
    for name in ("first", "other"):
        with writer.domain(name, sources=["made up"], inputs=name) as domain:
            for i in range(100):
                text = f"text {i:03d}"  # the same in both: as many of each are held out
                domain.add(text, token_ids=loaded.encode(f"{name} {i:03d} of text", add_special_tokens=False))
    writer.finish()
    backend.save(str(tmp_path / "corpus" / "tokenizer.json"))
    return tmp_path / "corpus"


def found(corpus: Path, *, sources: bool = False) -> Verification:
    return verify(corpus, sources=sources, rows=3, seed=0, console=Console(quiet=True))


def named(corpus: Path, *, sources: bool = False) -> dict[str, str]:
    return {Path(damage.file).name: damage.found for damage in found(corpus, sources=sources).damages}


def flip(path: Path, *, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    beside = one.with_name("beside")
    one.rename(beside)
    other.rename(one)
    beside.rename(other)


def test_a_whole_corpus_is_whole(corpus: Path) -> None:
    result = found(corpus)
    assert result.damages == []
    assert result.rows_decoded == 18
    assert result.bytes_read == sum(file.stat().st_size for file in corpus.glob("*/*") if file.suffix != ".json")
    assert Corpus.open(corpus).domains == ["first", "other"]


Damaging = Callable[[Path], object]


def truncate(name: str, by: int) -> Damaging:
    def damage(corpus: Path) -> None:
        path = corpus / "first" / name
        path.write_bytes(path.read_bytes()[:-by])

    return damage


def exchange(name: str) -> Damaging:
    return lambda corpus: swap(corpus / "first" / name, corpus / "other" / name)


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (truncate("train.bin", 2), "train.bin", "bytes"),
        (truncate("train_ends.npy", 8), "train_ends.npy", "header announces"),
        (truncate("test_hashes.npy", 8), "test_hashes.npy", "header announces"),
        (truncate("manifest.json", 20), "manifest.json", ""),
        (lambda corpus: (corpus / "first" / "validation.bin").unlink(), "validation.bin", "missing"),
        (lambda corpus: (corpus / "first" / "validation_ends.npy").unlink(), "validation_ends.npy", "missing"),
        (
            lambda corpus: swap(corpus / "first" / "train.bin", corpus / "first" / "validation.bin"),
            "train.bin",
            "bytes",
        ),
        (exchange("manifest.json"), "manifest.json", "the manifest of domain (first|other)"),
        (lambda corpus: flip(corpus / "first" / "train_ends.npy", at=200), "train_ends.npy", "content|not after"),
        (lambda corpus: flip(corpus / "other" / "test_hashes.npy", at=150), "test_hashes.npy", "other content"),
        (
            lambda corpus: swap(corpus / "first" / "train_ends.npy", corpus / "first" / "train_hashes.npy"),
            "train_ends.npy",
            "uint64",
        ),
    ],
)
def test_damage_that_is_found_when_a_run_starts(corpus: Path, damage: Damaging, file: str, message: str) -> None:
    damage(corpus)
    with pytest.raises(ShearingError, match=file):
        Corpus.open(corpus)
    damages = named(corpus)
    assert file in damages
    assert re.search(message, damages[file])


def test_files_of_two_domains_exchanged(corpus: Path, tmp_path: Path) -> None:
    sizes = [(corpus / name / "train.bin").stat().st_size for name in ("first", "other")]
    assert sizes[0] == sizes[1]
    # Equal sizes, equal ends: only their content tells these two apart.
    exchange("train.bin")(corpus)
    Corpus.open(corpus)
    assert set(named(corpus)) == {"train.bin"}
    assert len(found(corpus).damages) == 2
    exchange("train.bin")(corpus)
    assert found(corpus).damages == []


def test_exchanged_files_of_one_size_are_found_at_load_where_documents_differ(tmp_path: Path) -> None:
    writer = CorpusWriter(
        tmp_path,
        vocab_size=100,
        separator_id=0,
        tokenizer="t",
        tokenizer_fingerprint="f",
        validation_fraction=0.25,
        test_fraction=0.25,
    )
    for name, lengths in (("first", (3, 5)), ("other", (5, 3))):
        with writer.domain(name, sources=[], inputs=name) as domain:
            for i in range(40):
                domain.add(f"text {i // 2}", token_ids=[1 + i] * lengths[i % 2])
    writer.finish()
    assert len({(tmp_path / name / "train.bin").stat().st_size for name in ("first", "other")}) == 1
    exchange("train.bin")(tmp_path)
    with pytest.raises(ShearingError, match="no separator where document 0 ends"):
        Corpus.open(tmp_path)
    exchange("train.bin")(tmp_path)
    exchange("train_ends.npy")(tmp_path)
    with pytest.raises(ShearingError, match="exchanged with another domain"):
        Corpus.open(tmp_path)


def test_a_file_that_the_disk_does_not_give_is_named(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(integrity, "_tokens_at", fails)
    with pytest.raises(ShearingError, match=r"train\.bin = 'cannot be read: Input/output error'"):
        Corpus.open(corpus)
    assert named(corpus)["train.bin"] == "cannot be read: Input/output error"
    monkeypatch.undo()
    monkeypatch.setattr(integrity, "map_array", fails)
    (corpus / "first" / "train_ends.npy").write_bytes(b"other content")
    assert named(corpus)["train_ends.npy"] == "cannot be read: Input/output error"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_one_bit_is_found_by_reading_everything(corpus: Path, split: str) -> None:
    size = (corpus / "first" / f"{split}.bin").stat().st_size
    for at in (0, size // 2, size - 4):
        flip(corpus / "first" / f"{split}.bin", at=at)
        [damage] = found(corpus).damages
        assert damage.file.endswith(f"first/{split}.bin")
        flip(corpus / "first" / f"{split}.bin", at=at)
    assert found(corpus).damages == []


def test_ends_vocabulary_and_tokenizer(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shearing.data.corpus.integrity.SMALL_BYTES", 0)  # as if there were many documents
    file = corpus / "first" / "train_ends.npy"
    ends = np.load(file)
    np.save(file, np.concatenate([ends[:2][::-1], ends[2:]]))
    assert named(corpus)["train_ends.npy"] == f"document 1 ends at token {ends[0]}, not after the one before it"
    np.save(file, ends)
    tokens = np.fromfile(corpus / "first" / "train.bin", dtype=np.uint16)
    tokens[3] = 300
    tokens.tofile(corpus / "first" / "train.bin")
    assert named(corpus)["train.bin"] == "token id 300"
    tokens[ends[4] - 1] = 5
    tokens[3] = 5
    tokens.tofile(corpus / "first" / "train.bin")
    assert named(corpus)["train.bin"] == f"no separator where document 4 ends, at token {ends[4]}"
    content = (corpus / "tokenizer.json").read_text()
    (corpus / "tokenizer.json").write_text(content.replace('"</s>"', '"</t>"'))
    assert "another tokenizer" in named(corpus)["tokenizer.json"]
    (corpus / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in named(corpus)


def test_sources(tmp_path: Path, byte_tokenizer: Path) -> None:
    path = tmp_path / "a.ds"
    np.array([5, 6, 0, 7, 0, 8, 9, 0], dtype=np.uint16).tofile(path)
    np.array([3, 5, 8], dtype=np.uint64).tofile(tmp_path / "a.ds.index")
    adopt(
        domains={"d": path},
        tokenizer=str(byte_tokenizer),
        output=tmp_path / "corpus",
        validation="15%",
        test="15%",
        separator_token=None,
        console=Console(quiet=True),
    )
    assert found(tmp_path / "corpus", sources=True).damages == []
    flip(path, at=0)
    assert set(named(tmp_path / "corpus", sources=True)) >= {"a.ds"}
    # Tokens are checked whatever the file's time says.
    assert any("_ranges" in name for name in named(tmp_path / "corpus"))
    path.unlink()
    assert named(tmp_path / "corpus", sources=True)["a.ds"] == "missing"
    manifest = tmp_path / "corpus" / "d" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["sources"][0]["checksum"] = "etag:abc"
    manifest.write_text(json.dumps(values))
    assert found(tmp_path / "corpus", sources=True).unchecked == [str(path)]


def test_ranges_outside_of_their_files_are_named(tmp_path: Path, byte_tokenizer: Path) -> None:
    path = tmp_path / "a.ds"
    np.array([5, 6, 0, 7, 0, 8, 9, 0], dtype=np.uint16).tofile(path)
    np.array([3, 5, 8], dtype=np.uint64).tofile(tmp_path / "a.ds.index")
    adopt(
        domains={"d": path},
        tokenizer=str(byte_tokenizer),
        output=tmp_path / "corpus",
        validation="15%",
        test="15%",
        separator_token=None,
        console=Console(quiet=True),
    )
    file = tmp_path / "corpus" / "d" / "train_ranges.npy"
    ranges = np.load(file)
    ranges[2] += 1000
    np.save(file, ranges)
    assert named(tmp_path / "corpus")["train_ranges.npy"] == "ranges that lie outside of their files"


def test_the_command(corpus: Path) -> None:
    result = CliRunner().invoke(app, ["data", "verify", str(corpus)], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert "nothing wrong" in result.output
    shutil.rmtree(corpus / "other")
    flip(corpus / "first" / "train.bin", at=9)
    result = CliRunner().invoke(app, ["data", "verify", str(corpus)], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert "first/train.bin" in result.output
    assert "other/manifest.json" in result.output
    result = CliRunner().invoke(app, ["data", "verify", str(corpus / "nowhere")])
    assert result.exit_code == 2
