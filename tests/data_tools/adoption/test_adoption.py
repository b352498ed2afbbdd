from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from rich.console import Console
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer
from typer.testing import CliRunner

from data_tools.adoption import adoption
from data_tools.adoption.adoption import adopt
from shearing.cli.frame import app
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import SPLITS
from shearing.data.mixture.sampler import Mixture
from shearing.errors import ShearingError
from shearing.files.durable import LOCK

SEPARATOR = 0
Documents = list[list[int]]


def adopted(domains: dict[str, Path], *, tokenizer: Path, output: Path, test: str = "15%") -> Corpus:
    return adopt(
        domains=domains,
        tokenizer=str(tokenizer),
        output=output,
        validation="10%",
        test=test,
        separator_token=None,
        console=Console(quiet=True),
    )


def write_ds(path: Path, documents: Sequence[Sequence[int]], *, token_bytes: int = 2) -> None:
    """As datatrove's `TokenizedFile` does; a test below compares with the original."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.concatenate([np.empty(0, np.int64), *documents]).astype(f"<u{token_bytes}").tofile(path)
    np.cumsum([len(each) for each in documents]).astype("<u8").tofile(path.with_name(f"{path.name}.index"))
    path.with_name(f"{path.name}.metadata").write_text(f"some tokenizer|{token_bytes}\n1\n1T")


def write_arrow(path: Path, documents: Sequence[Sequence[int]], *, rows_per_batch: int = 3, shards: int = 2) -> None:
    import datasets

    made = datasets.Dataset.from_dict({"input_ids": documents, "other": list(range(len(documents)))})
    made.save_to_disk(path, num_shards=shards)


def texts(tokenizer: Path, count: int) -> Documents:
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return [loaded.encode(f"document {i}: " + "é" * (i % 7), add_special_tokens=False) for i in range(count)]


def contents(corpus: Corpus, domain: str) -> dict[str, Documents]:
    """Documents of each split, separators included."""
    found = {}
    for split in SPLITS:
        tokens = corpus.tokens(domain, split=split)
        ends = corpus.document_ends(domain, split=split).tolist()
        everything = tokens.read(0, len(tokens)).tolist()
        found[split] = [everything[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        assert len(everything) == len(tokens) == ends[-1]
    return found


documents = st.lists(st.lists(st.integers(1, 256), max_size=6), min_size=4, max_size=25)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=documents, second=documents, closed=st.booleans(), wide=st.booleans(), length=st.integers(1, 9))
def test_an_adopted_split_reads_like_a_file_of_its_documents(
    tmp_path_factory, byte_tokenizer: Path, first: Documents, second: Documents, closed: bool, wide: bool, length: int
) -> None:
    folder = tmp_path_factory.mktemp("adopted")
    everything = [each for each in first + second if each]
    if len({tuple(each) for each in everything}) < 3:
        return
    ending = [SEPARATOR] if closed else []
    for i, part in enumerate((first, second)):
        write_ds(folder / "set" / f"{i}.ds", [each + ending for each in part], token_bytes=4 if wide else 2)
    corpus = adopted({"d": folder / "set"}, tokenizer=byte_tokenizer, output=folder / "corpus")
    found = contents(corpus, "d")
    assert sorted(chain(*found.values())) == sorted([*each, SEPARATOR] for each in everything)
    distinct = [{tuple(each) for each in of_split} for of_split in found.values()]
    assert sum(map(len, distinct)) == len(set.union(*distinct))
    for split in SPLITS:
        # Documents stay in order, and rows of any length cross ranges and files as if there were none.
        order = [each[:-1] for each in found[split]]
        assert order == [each for each in everything if each in order]
        flat = [token for each in found[split] for token in each]
        assert corpus.manifests["d"].parts[split].tokens == len(flat)
        for i in range((len(flat) - 1) // length):
            row = corpus.row("d", i, sequence_length=length, split=split)
            assert row.tolist() == flat[i * length : i * length + length + 1]
    left_out = sum(not each for each in first + second)
    assert corpus.manifests["d"].left_out == ({"empty": left_out} if left_out else {})


def test_datasets_and_datatrove_give_the_same_corpus(tmp_path: Path, byte_tokenizer: Path) -> None:
    pytest.importorskip("datasets")
    made = texts(byte_tokenizer, 40)
    write_ds(tmp_path / "trove" / "a.ds", [[*each, SEPARATOR] for each in made])
    write_arrow(tmp_path / "arrow", made)
    one = adopted({"d": tmp_path / "trove"}, tokenizer=byte_tokenizer, output=tmp_path / "one")
    other = adopted({"d": tmp_path / "arrow"}, tokenizer=byte_tokenizer, output=tmp_path / "other")
    assert one.fingerprint == other.fingerprint
    assert one.manifests["d"].parts == other.manifests["d"].parts
    size = sum(len("document : ") + len(str(i)) + 2 * (i % 7) for i in range(40))
    assert one.manifests["d"].bytes == size
    batches = [
        Mixture(corpus, seed=0, sequence_length=16, weights={"d": 1.0}).batch(first_sample=0, num_sequences=50)
        for corpus in (one, other)
    ]
    assert batches[0].tokens.tolist() == batches[1].tokens.tolist()


def test_what_datatrove_itself_writes_is_read(tmp_path: Path, byte_tokenizer: Path) -> None:
    tokens = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    made = texts(byte_tokenizer, 30)
    file = tokens.TokenizedFile(str(tmp_path / "set"), "0.ds", tokenizer_name_or_path="it", save_final_metadata=True)
    for each in made:
        file.write([*each, SEPARATOR], None)
    file.close()
    corpus = adopted({"d": tmp_path / "set"}, tokenizer=byte_tokenizer, output=tmp_path / "corpus")
    found = contents(corpus, "d")
    assert sorted(chain(*found.values())) == sorted([*each, SEPARATOR] for each in made)


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list", "file"])
def test_every_layout_of_arrow_lists(tmp_path: Path, byte_tokenizer: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    made = [[1 + (i * 7 + j) % 200 for j in range(5)] for i in range(20)]
    types = {"large_list": pa.large_list(pa.int32()), "fixed_size_list": pa.list_(pa.uint16(), 5)}
    column = pa.array(made, type=types.get(kind, pa.list_(pa.int64())))
    table = pa.table({"text": [str(i) for i in range(20)], "input_ids": column})
    path = tmp_path / "set" / "data.arrow"
    path.parent.mkdir()
    with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=6)
    corpus = adopted({"d": path.parent}, tokenizer=byte_tokenizer, output=tmp_path / "corpus")
    found = contents(corpus, "d")
    assert sorted(chain(*found.values())) == sorted([*each, SEPARATOR] for each in made)


def test_another_separator_has_to_be_named(tmp_path: Path, byte_tokenizer: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(byte_tokenizer)
    loaded.add_special_tokens({"additional_special_tokens": ["<other>"]})
    loaded.save_pretrained(tmp_path / "tokenizer")
    other = loaded.convert_tokens_to_ids("<other>")
    write_ds(tmp_path / "a.ds", [[*each, other] for each in texts(byte_tokenizer, 20)])
    with pytest.raises(ShearingError, match="--separator-token '<other>'"):
        adopted({"d": tmp_path / "a.ds"}, tokenizer=tmp_path / "tokenizer", output=tmp_path / "corpus")
    corpus = adopt(
        domains={"d": tmp_path / "a.ds"},
        tokenizer=str(tmp_path / "tokenizer"),
        output=tmp_path / "corpus",
        validation="10%",
        test="15%",
        separator_token="<other>",
        console=Console(quiet=True),
    )
    found = contents(corpus, "d")
    assert sorted(chain(*found.values())) == sorted([*each, other] for each in texts(byte_tokenizer, 20))


def test_an_appended_separator_is_a_token_of_the_corpus(tmp_path: Path, byte_tokenizer: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(byte_tokenizer)
    loaded.add_special_tokens({"eos_token": "<end beyond all>"})
    loaded.save_pretrained(tmp_path / "tokenizer")
    separator = loaded.convert_tokens_to_ids("<end beyond all>")
    write_ds(tmp_path / "a.ds", texts(byte_tokenizer, 40))
    corpus = adopted({"d": tmp_path / "a.ds"}, tokenizer=tmp_path / "tokenizer", output=tmp_path / "corpus")
    assert corpus.manifests["d"].largest_token == corpus.manifests["d"].separator_id == separator
    Corpus.open(tmp_path / "corpus", vocab_size=separator + 1)
    with pytest.raises(ShearingError, match=f"token id {separator}"):
        Corpus.open(tmp_path / "corpus", vocab_size=separator)


def test_rows_of_a_stream_stay_as_they_are(tmp_path: Path, byte_tokenizer: Path) -> None:
    stream = [token for each in texts(byte_tokenizer, 300) for token in [*each, SEPARATOR]]
    rows = [stream[i : i + 50] for i in range(0, len(stream) - 50, 50)]
    write_ds(tmp_path / "a.ds", rows)
    corpus = adopted({"d": tmp_path / "a.ds"}, tokenizer=byte_tokenizer, output=tmp_path / "corpus")
    found = contents(corpus, "d")
    assert sorted(chain(*found.values())) == sorted(rows)


def test_adopting_twice_keeps_what_is_there_and_equal_texts_on_one_side(tmp_path: Path, byte_tokenizer: Path) -> None:
    made = texts(byte_tokenizer, 60)
    write_ds(tmp_path / "a.ds", made)
    write_ds(tmp_path / "b.ds", [*made[30:], *([9, i] for i in range(1, 40))], token_bytes=4)
    output = tmp_path / "corpus"
    adopted({"a": tmp_path / "a.ds"}, tokenizer=byte_tokenizer, output=output)
    before = {path: path.stat().st_mtime_ns for path in (output / "a").iterdir()}
    corpus = adopted({"a": tmp_path / "a.ds", "b": tmp_path / "b.ds"}, tokenizer=byte_tokenizer, output=output)
    assert {path: path.stat().st_mtime_ns for path in (output / "a").iterdir()} == before
    assert corpus.domains == ["a", "b"]
    sides = {split: set() for split in SPLITS}
    for domain in corpus.domains:
        for split in sides:
            sides[split] |= set(corpus.document_hashes(domain, split=split).tolist())
    assert sum(map(len, sides.values())) == len(set.union(*sides.values()))
    with pytest.raises(ShearingError, match="other settings"):
        adopted({"a": tmp_path / "a.ds"}, tokenizer=byte_tokenizer, output=output, test="10%")


def test_a_domain_that_comes_while_another_is_adopted(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        write_ds(tmp_path / f"{name}.ds", texts(byte_tokenizer, 60))
    other = adopted({"b": tmp_path / "b.ds"}, tokenizer=byte_tokenizer, output=tmp_path / "other")
    output, write = tmp_path / "corpus", adoption._write_domain

    def slowly(*arguments: Any, **keys: Any) -> None:
        write(*arguments, **keys)
        shutil.copytree(other.path / "b", output / "b")

    monkeypatch.setattr(adoption, "_write_domain", slowly)
    with pytest.raises(ShearingError, match="has written b meanwhile"):
        adopted({"a": tmp_path / "a.ds"}, tokenizer=byte_tokenizer, output=output)
    assert not (output / "a").exists()
    monkeypatch.setattr(adoption, "_write_domain", write)
    assert adopted({"a": tmp_path / "a.ds"}, tokenizer=byte_tokenizer, output=output).domains == ["a", "b"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_corpus_of_another_tokenizer_or_beginning_stays_as_it_was(tmp_path: Path, byte_tokenizer: Path) -> None:
    write_ds(tmp_path / "a.ds", texts(byte_tokenizer, 60))
    adopted({"a": tmp_path / "a.ds"}, tokenizer=byte_tokenizer, output=tmp_path / "corpus")
    before = content(tmp_path / "corpus")
    shutil.copytree(byte_tokenizer, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    own = Tokenizer.from_file(str(path))
    own.add_tokens(["<another>"])
    own.save(str(path))
    with pytest.raises(ShearingError, match="tokenizer of the domains that are there") as raised:
        adopted({"b": tmp_path / "a.ds"}, tokenizer=tmp_path / "other", output=tmp_path / "corpus")
    assert raised.value.field == "--tokenizer"
    assert content(tmp_path / "corpus") == before
    begun = Tokenizer.from_file(str(byte_tokenizer / "tokenizer.json"))
    begun.post_processor = processors.TemplateProcessing(
        single=f"{begun.id_to_token(1)} $A", special_tokens=[(begun.id_to_token(1), 1)]
    )
    begun.save(str(byte_tokenizer / "tokenizer.json"))
    write_ds(tmp_path / "b.ds", [[1, *each] for each in texts(byte_tokenizer, 60)])
    with pytest.raises(ShearingError, match="as in the domains that are there: no token in front"):
        adopted({"b": tmp_path / "b.ds"}, tokenizer=byte_tokenizer, output=tmp_path / "corpus")
    assert content(tmp_path / "corpus") == before


@pytest.mark.parametrize("renamed", [0, 1])
def test_domains_that_were_chosen_together_stay_so(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    made = texts(byte_tokenizer, 400)
    write_ds(tmp_path / "a.ds", made[:300])
    write_ds(tmp_path / "b.ds", made[150:])
    paths = {name: tmp_path / f"{name}.ds" for name in "ab"}
    whole = adopted(paths, tokenizer=byte_tokenizer, output=tmp_path / "whole")
    rename, left = Path.rename, [renamed]

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.startswith(".partial-"):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adopted(paths, tokenizer=byte_tokenizer, output=tmp_path / "parts")
    monkeypatch.undo()
    parts = adopted(paths, tokenizer=byte_tokenizer, output=tmp_path / "parts")
    for domain in "ab":
        assert contents(parts, domain) == contents(whole, domain)
    assert [path.name for path in (tmp_path / "parts").glob(".*")] == [LOCK]


def test_a_name_that_is_given_twice_is_refused(tmp_path: Path, byte_tokenizer: Path) -> None:
    command = ["data", "adopt", "--domain", "a=x.ds", "--domain", "a=y.ds", "--tokenizer", str(byte_tokenizer)]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "corpus")])
    assert result.exit_code == 2
    assert "each name once" in result.stderr


def test_files_changed_since_are_found_when_opened(tmp_path: Path, byte_tokenizer: Path) -> None:
    for name in "ab":
        write_ds(tmp_path / f"{name}.ds", [[ord(name), i + 1, SEPARATOR] for i in range(50)])
        os.utime(tmp_path / f"{name}.ds", ns=(10**18, 10**18 + ord(name)))
    paths = {name: tmp_path / f"{name}.ds" for name in "ab"}
    corpus = adopted(paths, tokenizer=byte_tokenizer, output=tmp_path / "corpus")
    paths["a"].rename(tmp_path / "c.ds")
    with pytest.raises(ShearingError, match="missing"):
        Corpus.open(corpus.path)
    shutil.copy2(paths["b"], paths["a"])  # as large, and as old as the other was
    with pytest.raises(ShearingError, match="exchanged since it was adopted"):
        Corpus.open(corpus.path)
    paths["a"].write_bytes(paths["b"].read_bytes()[:-2])
    with pytest.raises(ShearingError, match="298 bytes"):
        Corpus.open(corpus.path)


def test_sets_that_cannot_be_used(tmp_path: Path, byte_tokenizer: Path) -> None:
    def refused(path: Path, match: str, **settings: str) -> None:
        with pytest.raises(ShearingError, match=match):
            adopted({"d": path}, tokenizer=byte_tokenizer, output=tmp_path / "corpus", **settings)

    refused(tmp_path / "nowhere", "correct the path")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("text")
    refused(tmp_path / "text", "shear data prepare")
    path = tmp_path / "a.ds"
    write_ds(path, [[1, 2, 3], [4, 300]])
    refused(path, "token ids from 1 to 300")
    refused(path, "as 5%", test="much")
    write_ds(path, [[1, 2, 3]])
    refused(path, "at least 3 different")
    path.write_bytes(b"12345")
    refused(path, "5 bytes")
    (tmp_path / "a.ds.index").write_bytes(b"1234567")
    refused(path, "do not rise")
    (tmp_path / "a.ds.index").unlink()
    refused(path, "save_index")
    pa = pytest.importorskip("pyarrow")
    for name, table, options, match in (
        ("text", pa.table({"text": ["a"]}), None, "columns text"),
        ("floats", pa.table({"input_ids": [[1.0]]}), None, "holds list<"),
        ("gaps", pa.table({"input_ids": [[1, None]]}), None, "with gaps"),
        (
            "packed",
            pa.table({"input_ids": [list(range(200)) * 50]}),
            pa.ipc.IpcWriteOptions(compression="zstd"),
            "compr",
        ),
    ):
        with pa.ipc.new_stream(str(tmp_path / f"{name}.arrow"), table.schema, options=options) as writer:
            writer.write_table(table)
        refused(tmp_path / f"{name}.arrow", match)
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"input_ids": [[1]]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "several")
    refused(tmp_path / "several", "name one: .*several/test, .*several/train")
