"""What cannot be read: one message with its place, or counted; never passed over in silence."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from shearing.data.corpus.corpus import Corpus
from shearing.errors import ShearingError
from tests.data_tools.conftest import all_texts, write_lines
from tests.data_tools.preparation.test_prepare import parquet

Prepared = Callable[..., Corpus]
GOOD = [f"good {i}" for i in range(20)]
LINES = [json.dumps({"text": text}).encode() for text in GOOD]


def lines(*bad: bytes) -> bytes:
    """Good lines, with these after the third."""
    return b"\n".join([*LINES[:3], *bad, *LINES[3:]]) + b"\n"


BROKEN_ZST = zstandard.ZstdCompressor().compress(lines() * 200)[:-9]
BROKEN_GZ = gzip.compress(lines() * 200)[:-9]
NOT_UTF8 = b'{"text": "caf\xe9"}'

# Name and content of a file, what the message says and where, the reason it is counted under, good texts in there.
CASES = {
    "no field": ("a.jsonl", lines(b'{"body": 1}'), "a.jsonl:4", "fields 'body'", "no_text", 20),
    "no text in it": ("a.jsonl", lines(b'{"text": 3}'), "a.jsonl:4", "int in the field 'text'", "no_text", 20),
    "no object": ("a.jsonl", lines(b"[1]"), "a.jsonl:4", "a list and no object", "no_text", 20),
    "broken JSON": ("a.jsonl", lines(b'{"text": '), "a.jsonl:4", "Expecting value", "bad_json", 20),
    "a line that is cut off": ("a.jsonl", lines()[:-4], "a.jsonl:20", "Unterminated string", "bad_json", 19),
    "not UTF-8": ("a.jsonl", lines(NOT_UTF8), "a.jsonl:4", "byte 0xe9 at offset 13", "not_utf8", 20),
    "a long line": ("a.jsonl", lines(b'{"text": "%b"}' % (b"x" * 9000)), "a.jsonl:4", "more than 5000", "too_long", 20),
    "a gz cut off": ("a.jsonl.gz", BROKEN_GZ, "a.jsonl.gz", "ended before", "damaged", None),
    "no gz": ("a.jsonl.gz", b"plain text", "a.jsonl.gz", "Not a gzipped file", "damaged", None),
    "a zst cut off": ("a.jsonl.zst", BROKEN_ZST, "a.jsonl.zst", "ends too early", "damaged", None),
    "no zst": ("a.jsonl.zst", b"plain text", "a.jsonl.zst", "zstd decompressor error", "damaged", None),
    "no parquet": ("a.parquet", b"plain text" * 9, "a.parquet, row 0", "Parquet", "damaged", None),
    "latin text": ("a.txt", b"one\ntwo\ncaf\xe9", "a.txt:3", "byte 0xe9", "not_utf8", 0),
    "a long text": ("a.md", b"x" * 6000, "a.md:1", "more than 5000", "too_long", 0),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_stops_with_its_place_or_is_counted(case: str, prepared: Prepared, tmp_path: Path) -> None:
    name, content, place, message, reason, good = CASES[case]
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / name).write_bytes(content)
    write_lines(folder / "z.jsonl", ["more", "text", "here"])
    keys = {"max_document_bytes": 5000}
    with pytest.raises(ShearingError) as stopped:
        prepared({"d": str(folder)}, **keys)
    assert f"{folder}/{place} = " in str(stopped.value)
    assert message in str(stopped.value)
    assert "bad_input=skip" in str(stopped.value)
    assert not (tmp_path / "corpus" / "corpus.json").exists()
    corpus = prepared({"d": str(folder)}, bad_input="skip", **keys)
    assert corpus.manifests["d"].left_out == {reason: 1}
    if good is not None:
        assert all_texts(corpus, "d") == sorted([*GOOD[:good], "here", "more", "text"])


def test_what_was_skipped_is_not_taken_for_good_when_it_is_to_stop(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(b"[1]"))
    write_lines(tmp_path / "b.jsonl", ["one"])
    domains = {"a": str(tmp_path / "a.jsonl"), "b": str(tmp_path / "b.jsonl")}
    with pytest.raises(ShearingError, match="domain b"):
        prepared(domains, bad_input="skip")
    with pytest.raises(ShearingError, match="1 no_text"):
        prepared(domains)


def test_a_domain_in_which_bad_input_was_skipped_is_not_kept_when_it_is_to_stop(
    prepared: Prepared, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(b"[1]", b'{"text": " "}', LINES[0]))
    domains = {"a": str(tmp_path / "a.jsonl")}
    left_out = {"duplicate": 1, "empty": 1, "no_text": 1}
    assert prepared(domains, bad_input="skip", duplicates="remove").manifests["a"].left_out == left_out
    with pytest.raises(ShearingError, match=r"domain a = '1 no_text'\n.*\n.*bad_input=skip again, or"):
        prepared(domains, duplicates="remove")
    assert prepared(domains, bad_input="skip", duplicates="remove").domains == ["a"]


def test_rows_of_tables(prepared: Prepared, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = parquet(tmp_path / "null.parquet", [*GOOD[:12], None, *GOOD[12:]])
    with pytest.raises(ShearingError, match=r"null\.parquet, row 12"):
        prepared({"a": str(path)})
    assert prepared({"a": str(path)}, bad_input="skip").manifests["a"].left_out == {"no_text": 1}
    path = parquet(tmp_path / "other.parquet", GOOD, field="body")
    with pytest.raises(ShearingError, match="fields 'body', 'id'"):
        prepared({"b": str(path)})
    broken = pa.array([b"good", b"caf\xe9", b"fine"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "latin.parquet")
    with pytest.raises(ShearingError, match=r"latin\.parquet, row 1"):
        prepared({"c": str(tmp_path / "latin.parquet")})
    data = parquet(tmp_path / "whole.parquet", GOOD).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-40])
    with pytest.raises(ShearingError, match="cut off or damaged"):
        prepared({"e": str(tmp_path / "cut.parquet")})


def test_blank_documents_are_counted_and_blank_lines_are_none(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(b"", b'{"text": " \\n"}', b"", b'{"text": ""}'))
    corpus = prepared({"a": str(tmp_path / "a.jsonl")})
    assert corpus.manifests["a"].left_out == {"empty": 2}
    assert all_texts(corpus, "a") == sorted(GOOD)


def test_what_python_writes_is_read(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(b'{"text": "a\\ud800b", "score": NaN}'))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\n--two--three")
    corpus = prepared({"a": str(tmp_path / "a.jsonl"), "b": str(tmp_path / "b.txt")}, document_separator="--")
    assert all_texts(corpus, "a") == sorted([*GOOD, "a?b"])
    assert all_texts(corpus, "b") == ["one?\n", "three", "two"]


def test_a_line_of_ten_megabytes(prepared: Prepared, tmp_path: Path) -> None:
    long = "lorem ipsum " * 850_000
    corpus = prepared(
        {"a": str(write_lines(tmp_path / "a.jsonl", ["short", long, "other"]))}, validation="1 tokens", test="1 tokens"
    )
    assert corpus.manifests["a"].bytes == len(long) + 10


@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_large_text_files_are_divided_a_piece_at_a_time(
    separator: str | None, prepared: Prepared, tmp_path: Path
) -> None:
    from io import BytesIO

    from shearing.data.texts.plain_texts import pieces as divided

    texts = [str(i) * (i % 50_000) for i in range(0, 400_000, 977)]
    data = "\n\n".join(texts).encode()
    divider = separator.encode() if separator else None
    pieces = [piece.whole for piece in divided(BytesIO(data), separator=divider, limit=10**9)]
    assert pieces == (data.split(divider) if divider else [data])
    assert all(
        piece.whole is None or len(piece.whole) <= 70_000
        for piece in divided(BytesIO(data), separator=divider, limit=70_000)
    )


def test_paths_that_hold_nothing(prepared: Prepared, tmp_path: Path) -> None:
    def fails(path: object, message: str, **keys: object) -> None:
        with pytest.raises(ShearingError) as error:
            prepared({"a": path}, **keys)
        assert message in str(error.value)
        assert not (tmp_path / "corpus").exists()

    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    a = write_lines(tmp_path / "a.jsonl", GOOD)
    fails(str(tmp_path / "nowhere"), "correct the path")
    fails(str(tmp_path / "empty"), "there are no files")
    fails(str(tmp_path / "*.parquet"), "there are no files")
    fails(str(tmp_path / "picture.png"), "convert the text")
    fails([str(a), str(tmp_path / "*.jsonl")], "two of the domain's paths hold this file")
    fails("s4://bucket/file.jsonl", "URL that fsspec can open")
    fails(str(a), "did you mean </s>?", separator_token="<s>")
    fails(str(a), "add the tokenizer's files", tokenizer=tmp_path / "empty")
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(ShearingError, match="how one file divides"):
        prepared({"a": str(tmp_path / "one.txt")})


def test_a_tokenizer_without_an_end(prepared: Prepared, letters: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(letters / "tokenizer.json")).save_pretrained(tmp_path / "endless")
    a = write_lines(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(ShearingError, match="--separator-token TOKEN"):
        prepared({"a": str(a)}, tokenizer=tmp_path / "endless")
    assert all_texts(prepared({"a": str(a)}, tokenizer=tmp_path / "endless", separator_token="</s>"), "a") == sorted(
        GOOD
    )


def test_a_domain_that_is_all_in_an_earlier_one(prepared: Prepared, tmp_path: Path) -> None:
    corpus = prepared({"a": str(write_lines(tmp_path / "a.jsonl", GOOD))})
    from tests.data_tools.conftest import texts_of

    again = write_lines(tmp_path / "b.jsonl", texts_of(corpus, "a", "train"))
    with pytest.raises(ShearingError, match="in other parts of domains prepared earlier"):
        prepared({"b": str(again)})
    assert Corpus.open(corpus.path).domains == ["a"]
