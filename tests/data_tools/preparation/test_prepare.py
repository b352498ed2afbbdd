"""From files of every kind to a corpus: nothing lost, nothing twice, and the same bytes however it was made."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from typer.testing import CliRunner

from data_tools.preparation import steps
from data_tools.preparation.decision import Decision
from data_tools.preparation.recipe import load_preparation
from data_tools.preparation.work_folder import PREFIX
from shearing.cli.frame import app
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import HELD_OUT, SPLITS, text_hash
from shearing.data.recipe import PUBLISHED_HELDOUT_TOKENS
from shearing.errors import ShearingError
from shearing.files.checksums import sha256_of_file
from shearing.runs.recipe import load_recipe
from tests.data_tools.conftest import all_texts, content, distinct_texts, texts_of, write_lines
from tests.repository import ROOT

Prepared = Callable[..., Corpus]
TEXTS = [f"line {i}" for i in range(40)]


def parquet(path: Path, texts: list[object], *, field: str = "text") -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({field: texts, "id": list(range(len(texts)))}), path, row_group_size=7)
    return path


@pytest.fixture
def every_kind(tmp_path: Path) -> dict[str, str]:
    """The same texts in files of every kind."""
    import datasets
    import fsspec

    plain = write_lines(tmp_path / "plain" / "a.jsonl", TEXTS)
    data = plain.read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data[:100]) + gzip.compress(data[100:]))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "c.jsonl.zst").write_bytes(compress(data[:100]) + compress(data[100:]))
    parquet(tmp_path / "d.parquet", list(TEXTS))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "e.txt").write_text("\n---\n".join(TEXTS[:20]))
    (tmp_path / "notes" / "f.md.gz").write_bytes(gzip.compress("\n---\n".join(TEXTS[20:]).encode()))
    (tmp_path / "notes" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "notes" / ".hidden.txt").write_text("hidden")
    parts = tmp_path / "parts"
    write_lines(parts / "x" / "1.jsonl", TEXTS[:11])
    write_lines(parts / "2.jsonl", TEXTS[11:])
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "splits")
    hub = tmp_path / "hub"
    hub.mkdir()
    parquet(hub / "train-0.parquet", list(TEXTS[:15]))
    parquet(hub / "train-1.parquet", list(TEXTS[15:]))
    with fsspec.open("memory://bucket/texts/g.jsonl", "wb") as file:
        file.write(data)
    return {
        "lines": str(plain),
        "gz": str(tmp_path / "b.jsonl.gz"),
        "zst": str(tmp_path / "c.jsonl.zst"),
        "parquet": str(tmp_path / "d.parquet"),
        "notes": str(tmp_path / "notes"),
        "folder": str(parts),
        "glob": str(parts / "**" / "*.jsonl"),
        "saved": str(tmp_path / "saved"),
        "splits": str(tmp_path / "splits"),
        "hub": f"hf:{hub}",
        "remote": "memory://bucket/texts/*.jsonl",
        "url": f"file://{plain}",
    }


def test_every_kind_of_input_holds_the_same_documents(
    every_kind: dict[str, str], prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    domains: dict[str, object] = dict(every_kind)
    domains["stored"] = {"paths": every_kind["hub"], "streaming": False}
    corpus = prepared(domains, document_separator="\n---\n", validation="10%", test="10%")
    assert set(corpus.domains) == set(domains)
    held_out = {split: {text_hash(t.encode()) for t in texts_of(corpus, "lines", split)} for split in HELD_OUT}
    for name in corpus.domains:
        assert all_texts(corpus, name) == sorted(TEXTS), name
        manifest = corpus.manifests[name]
        assert manifest.bytes == sum(map(len, TEXTS))
        # The same texts are held out everywhere, whatever the order of the files is.
        assert {split: set(corpus.document_hashes(name, split=split).tolist()) for split in HELD_OUT} == held_out
    assert texts_of(corpus, "saved", "train") == texts_of(corpus, "lines", "train")
    assert texts_of(corpus, "stored", "train") == texts_of(corpus, "hub", "train")
    (source,) = corpus.manifests["lines"].sources
    assert source.path == every_kind["lines"]
    assert source.checksum.startswith("sha256:")
    assert source.bytes == Path(source.path).stat().st_size
    assert [Path(s.path).name for s in corpus.manifests["notes"].sources] == ["e.txt", "f.md.gz"]
    assert not list(corpus.path.glob(f"{PREFIX}*"))


def test_checksums_are_of_the_files(every_kind: dict[str, str], prepared: Prepared) -> None:
    import hashlib

    names = ["lines", "gz", "parquet"]
    corpus = prepared({name: every_kind[name] for name in names}, documents_per_file=10)
    for name in names:
        (source,) = corpus.manifests[name].sources
        assert source.checksum == f"sha256:{hashlib.sha256(Path(every_kind[name]).read_bytes()).hexdigest()}"
        assert all_texts(corpus, name) == sorted(TEXTS[:10])
    for split in SPLITS:
        counts = corpus.manifests["lines"].parts[split]
        for checksum, file in (
            (counts.sha256, f"{split}.bin"),
            (counts.ends_sha256, f"{split}_ends.npy"),
            (counts.hashes_sha256, f"{split}_hashes.npy"),
        ):
            assert checksum == hashlib.sha256((corpus.path / "lines" / file).read_bytes()).hexdigest()
        hashes = [text_hash(text.encode()) for text in texts_of(corpus, "lines", split)]
        assert corpus.document_hashes("lines", split=split).tolist() == hashes  # type: ignore[arg-type]


def test_what_a_text_spells_is_text(prepared: Prepared, tmp_path: Path) -> None:
    corpus = prepared({"a": str(write_lines(tmp_path / "a.jsonl", ["one </s> two", "three", "four"]))})
    assert all_texts(corpus, "a") == ["four", "one </s> two", "three"]


def test_the_corpus_can_be_decoded_without_being_told_how(prepared: Prepared, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from shearing.data.corpus.format import tokenizer_fingerprint

    corpus = prepared({"a": str(write_lines(tmp_path / "a.jsonl", TEXTS))})
    tokenizer = Tokenizer.from_file(str(corpus.path / "tokenizer.json"))
    assert tokenizer_fingerprint(tokenizer) == corpus.manifests["a"].tokenizer_fingerprint


def test_prepared_domains_are_kept_added_to_and_protected(prepared: Prepared, tmp_path: Path) -> None:
    first = write_lines(tmp_path / "first.jsonl", TEXTS)
    corpus = prepared({"first": str(first)})
    before = (corpus.path / "first" / "train.bin").stat().st_mtime_ns
    more = write_lines(tmp_path / "more.jsonl", ["one", "two", "three"])
    corpus = prepared({"first": str(first), "more": str(more)})
    assert corpus.domains == ["first", "more"]
    assert (corpus.path / "first" / "train.bin").stat().st_mtime_ns == before
    with pytest.raises(ShearingError, match="other text or with other settings"):
        prepared({"first": str(first)}, split_seed=1)
    write_lines(first, TEXTS[:20])
    with pytest.raises(ShearingError, match="choose another output"):
        prepared({"first": str(first)})


def test_another_tokenizer_is_refused_before_anything_is_read(
    prepared: Prepared, tmp_path: Path, tiny_inputs: Path
) -> None:
    prepared({"a": str(write_lines(tmp_path / "a.jsonl", TEXTS))})
    with pytest.raises(ShearingError, match="the tokenizer of the domains that are there"):
        prepared({"b": str(write_lines(tmp_path / "b.jsonl", TEXTS))}, tokenizer=tiny_inputs / "model")


def test_the_same_bytes_with_two_workers_as_with_one(prepared: Prepared, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(6):
        texts = ["".join(generator.choice(list("abcdef "), size=generator.integers(1, 300))) for _ in range(40)]
        write_lines(tmp_path / "texts" / f"{i}.jsonl", texts)
    domains = {"all": str(tmp_path / "texts"), "some": str(tmp_path / "texts" / "[02].jsonl")}
    keys = {"validation": "10%", "near_duplicates": "together"}
    one = prepared(domains, output=tmp_path / "one", **keys)
    two = prepared(domains, output=tmp_path / "two", workers=2, task_bytes=6_000, **keys)
    assert content(one.path) == content(two.path)


def test_equal_texts_are_counted_or_removed(prepared: Prepared, tmp_path: Path) -> None:
    a = write_lines(tmp_path / "a.jsonl", [*TEXTS, "line 3", "line 3", "line 5"])
    b = write_lines(tmp_path / "b.jsonl", [*TEXTS[:5], *(f"other {i}" for i in range(30))])
    domains = {"a": str(a), "b": str(b)}
    kept = prepared(domains, validation="15%", test="15%", output=tmp_path / "kept")
    assert kept.manifests["a"].duplicates == 3
    assert kept.manifests["a"].left_out == {}
    removed = prepared(domains, validation="15%", test="15%", output=tmp_path / "removed", duplicates="remove")
    assert removed.manifests["a"].duplicates == 0
    assert removed.manifests["a"].left_out == {"duplicate": 3}
    assert all_texts(removed, "a") == sorted(TEXTS)
    for corpus in (kept, removed):
        sides = distinct_texts(corpus, "ab")
        assert all(sides)
        assert sum(map(len, sides)) == len(set.union(*sides))


def test_near_duplicates_stay_together_or_go(prepared: Prepared, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    words = ["".join(generator.choice(list("abcdefghij"), size=5)) for _ in range(400)]
    originals = [" ".join(generator.choice(words, size=120)) for _ in range(30)]
    variants = [[f"{text} ending {i}" for i in range(4)] for text in originals]
    a = write_lines(tmp_path / "a.jsonl", [text for each in variants for text in each[:3]])
    b = write_lines(
        tmp_path / "b.jsonl", [*(each[3] for each in variants), *originals[:1], "short", "shorter", "shortest"]
    )
    domains = {"a": str(a), "b": str(b)}
    corpus = prepared(domains, validation="10%", test="10%", near_duplicates="together", output=tmp_path / "together")
    sides = distinct_texts(corpus, "ab")
    for original, each in zip(originals, variants, strict=True):
        group = {*each, original} & set.union(*sides)
        assert any(group <= side for side in sides)
    assert len(all_texts(corpus, "a")) == 90
    corpus = prepared(domains, validation="10%", test="10%", near_duplicates="remove", output=tmp_path / "removed")
    assert all_texts(corpus, "a") == sorted(each[0] for each in variants)
    assert corpus.manifests["a"].left_out == {"near_duplicate": 60}
    assert all_texts(corpus, "b") == ["short", "shorter", "shortest"]


def test_a_number_of_tokens_held_out(prepared: Prepared, tmp_path: Path) -> None:
    a = write_lines(tmp_path / "a.jsonl", [f"document {i:03}" for i in range(500)])
    corpus = prepared({"a": str(a)}, validation="1K tokens", test="10%")
    manifest = corpus.manifests["a"]
    assert manifest.sizes == {"validation": "1000 tokens", "test": "10%"}
    assert 1000 <= manifest.parts["validation"].tokens < 1000 + len("document 000") + 1
    assert 650 <= manifest.parts["test"].tokens < 650 + len("document 000") + 1
    with pytest.raises(ShearingError, match="less together than domain a has"):
        prepared({"a": str(a)}, test="1M tokens", output=tmp_path / "other")


def test_preparing_twice_at_once_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    import fcntl
    import os

    a = write_lines(tmp_path / "a.jsonl", TEXTS)
    output = tmp_path / "corpus"
    output.mkdir()
    folder = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with pytest.raises(ShearingError, match="another one is running there"):
            prepared({"a": str(a)})
    finally:
        os.close(folder)
    assert prepared({"a": str(a)}).domains == ["a"]


def test_a_domain_that_came_after_it_was_decided_what_is_held_out(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two domains none, the first, or the first of another decision is there by then."""
    texts = {"a": TEXTS, "b": [f"other {i}" for i in range(60)]}
    paths = {name: str(write_lines(tmp_path / f"{name}.jsonl", lines)) for name, lines in texts.items()}
    c = str(write_lines(tmp_path / "c.jsonl", [*TEXTS[:20], *texts["b"][:40]]))
    write = steps.WriteDomain.do
    for number in range(3):
        output, sizes = tmp_path / str(number), {"validation": "20%", "test": "20%"}

        def killed(step: steps.WriteDomain, rank: int, published: int = number % 2) -> None:
            if rank == published:
                raise KeyboardInterrupt
            write(step, rank)

        monkeypatch.setattr(steps.WriteDomain, "do", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(paths, output=output, **sizes)
        monkeypatch.setattr(steps.WriteDomain, "do", write)
        assert (output / "a").exists() == (number == 1)
        prepared({"a": paths["a"]} if number == 2 else {"c": c}, output=output, **sizes)
        corpus = prepared(paths, output=output, **sizes)
        if number == 2:
            corpus = prepared({"c": c}, output=output, **sizes)
        train, validation, test = distinct_texts(corpus, "abc")
        assert not train & validation | train & test | validation & test, number


def test_a_domain_that_comes_while_another_is_written(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As jobs of a cluster may, which hold no folder while they wait."""
    a, c = (str(write_lines(tmp_path / f"{name}.jsonl", TEXTS[first:])) for name, first in (("a", 0), ("c", 20)))
    sizes = {"validation": "20%", "test": "20%"}
    other = prepared({"c": c}, output=tmp_path / "other", **sizes)
    write, output = steps.write_domain_folder, tmp_path / "corpus"

    def slowly(folder: Path, **keys: Any) -> None:
        write(folder, **keys)
        shutil.copytree(other.path / "c", output / "c")

    monkeypatch.setattr(steps, "write_domain_folder", slowly)
    with pytest.raises(ShearingError, match="has written c meanwhile"):
        prepared({"a": a}, **sizes)
    assert not (output / "a").exists()
    monkeypatch.setattr(steps, "write_domain_folder", write)
    train, validation, test = distinct_texts(prepared({"a": a}, **sizes), "ac")
    assert not train & validation | train & test | validation & test


def test_command_with_options_and_with_a_recipe(letters: Path, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "lines.jsonl", TEXTS, field="body")
    (tmp_path / "notes.txt").write_text("first\n---\nsecond\n---\n \n---\nthird")
    options = [
        "--text-field",
        "body",
        "--document-separator",
        r"\n---\n",
        "--validation",
        "10%",
        "--test",
        "10%",
        "--workers",
        "1",
    ]
    command = ["data", "prepare", "--domain", f"lines={lines}", "--domain", f"notes={tmp_path / 'notes.txt'}"]
    command += ["--tokenizer", str(letters), *options]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "one")], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "1 empty" in result.output
    assert "\n2 domains, 2 files, " in f"\n{result.output}"
    output = tmp_path / "one"
    following = f"look into it: shear data inspect {output}; train on it: data.corpus={output}\n"
    assert result.output.endswith(f"{output} is complete; {following}")
    result = CliRunner().invoke(app, [*command, "-o", str(output)], env={"COLUMNS": "80"})
    assert result.output.endswith(f"{output} is complete already; {following}")
    for heading in ("documents", "training", "validation", "test", "bytes", "duplicates", "left out"):
        assert f" {heading}" in result.output
    recipe = tmp_path / "texts.yaml"
    recipe.write_text(
        json.dumps(
            {
                "output": str(tmp_path / "two"),
                "tokenizer": str(letters),
                "text_field": "body",
                "document_separator": "\n---\n",
                "domains": {"lines": str(lines), "notes": {"paths": [str(tmp_path / "notes.txt")]}},
            }
        )
    )
    result = CliRunner().invoke(app, ["data", "prepare", str(recipe), "validation=10%", "test=10%", "workers=1"])
    assert result.exit_code == 0, result.output
    assert content(tmp_path / "one") == content(tmp_path / "two")
    result = CliRunner().invoke(app, ["data", "prepare", str(recipe), "test=10%", "domains.more=nowhere"])
    assert result.exit_code == 2
    assert "correct the path" in result.output
    shutil.rmtree(tmp_path / "two")


def test_redpajama_makes_what_the_papers_recipes_name(letters: Path, tmp_path: Path) -> None:
    path = ROOT / "recipes" / "data" / "redpajama.yaml"
    recipe = load_preparation(path)
    for name in ("sheared-llama-1.3b", "sheared-llama-2.7b"):
        run = load_recipe(ROOT / "recipes" / f"{name}.yaml")
        assert run.data.corpus == recipe.output
        assert run.data.domains == list(recipe.domains)
        assert recipe.sizes.validation.tokens >= PUBLISHED_HELDOUT_TOKENS
    overrides = [f"output={tmp_path / 'corpus'}", f"tokenizer={letters}", "validation=20%", "test=20%", "workers=1"]
    for domain, sources in recipe.domains.items():
        for i, pattern in enumerate(sources.paths):
            file = write_lines(tmp_path / pattern.replace("*", "part"), [f"{domain} {i} {j}" for j in range(9)])
            if file.suffix == ".zst":
                file.write_bytes(zstandard.ZstdCompressor().compress(file.read_bytes()))
        paths = [str(tmp_path / pattern) for pattern in sources.paths]
        overrides.append(
            f"domains.{domain}.paths={json.dumps(paths)}" if domain == "cc" else f"domains.{domain}={paths[0]}"
        )
    result = CliRunner().invoke(app, ["data", "prepare", str(path), *overrides])
    assert result.exit_code == 0, result.output
    corpus = Corpus.open(tmp_path / "corpus", domains=recipe.domains)
    assert len(all_texts(corpus, "cc")) == 45
    assert len(all_texts(corpus, "book")) == 9


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["validation=2"], "a share of the tokens"),
        (["test=100%"], "as 2M tokens"),
        (["test=95%"], "shares below 100% together"),
        (["near_duplicates=gone"], "near_duplicates"),
        (["executr=ray"], "did you mean executor?"),
        (["domains.a.txt_field=b"], "did you mean domains.a.text_field?"),
        (["domains={a/b: x}"], "rename the domain"),
        (["executor=slurm"], "slurm.partition"),
        (["domains=null"], "domains"),
    ],
)
def test_recipe_errors_name_key_and_place(tmp_path: Path, keys: list[str], message: str) -> None:
    recipe = tmp_path / "texts.yaml"
    recipe.write_text("output: o\ntokenizer: t\ndomains:\n  a:\n    paths: [x]\n")
    result = CliRunner().invoke(app, ["data", "prepare", str(recipe), *keys])
    assert result.exit_code == 2
    assert message in result.output
    assert f"override {keys[0]}" in result.output or keys == ["executor=slurm"]


def test_recipe_errors_name_the_line(tmp_path: Path) -> None:
    recipe = tmp_path / "texts.yaml"
    recipe.write_text("output: o\ntokenizer: t\ndomains:\n  a:\n    paths: []\n    split: 3\n")
    result = CliRunner().invoke(app, ["data", "prepare", str(recipe)])
    assert f"{recipe}:5: domains.a.paths" in result.output
    assert f"{recipe}:6: domains.a.split" in result.output


ASKED = [" ".join(3 * a + b + c for c in "abcdefghij") for a in "abcdef" for b in "vwxyz"]
CHATS = [[{"role": "user", "content": f"{a} </s>"}, {"role": "assistant", "content": "say"}] for a in ASKED]
WRITTEN = [f"user>{asked} </s></s>assistant>say</s>" for asked in ASKED]
TURNS = "{% for m in messages %}{{ m.role + '>' + m.content + eos_token }}{% endfor %}"


@pytest.fixture
def chat_tokenizer(letters: Path, tmp_path: Path) -> Path:
    """The tokenizer of letters, with a template."""
    folder = Path(shutil.copytree(letters, tmp_path / "chat-tokenizer"))
    (folder / "chat_template.jinja").write_text(TURNS)
    return folder


def test_chats_in_files_of_every_kind(chat_tokenizer: Path, prepared: Prepared, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", CHATS, field="messages")
    (tmp_path / "b.json").write_text(json.dumps([{"data": {"chat": chat}} for chat in CHATS], indent=1))
    table = parquet(tmp_path / "c.parquet", list(CHATS), field="messages")
    (tmp_path / "hub").mkdir()
    parquet(tmp_path / "hub" / "train.parquet", list(CHATS), field="messages")
    text = write_lines(tmp_path / "d.jsonl", [f"only text {i}" for i in range(30)])
    corpus = prepared(
        {
            "lines": str(lines),
            "array": {"paths": str(tmp_path / "b.json"), "text_field": "data.chat"},
            "table": str(table),
            "hub": f"hf:{tmp_path / 'hub'}",
            "text": {"paths": str(text), "format": "text"},
        },
        format="chat",
        tokenizer=chat_tokenizer,
        near_duplicates="together",
        workers=2,
    )
    ends = 0  # the token; spelled out by a message it is four letters
    for name in ("lines", "array", "table", "hub"):
        documents = []
        for split in SPLITS:
            tokens = corpus.tokens(name, split=split).read(0, 10**6)
            documents += np.split(tokens, corpus.document_ends(name, split=split)[:-1])
            hashes = corpus.document_hashes(name, split=split).tolist()
            assert set(hashes) <= {text_hash(text.encode()) for text in WRITTEN}
        assert len(documents) == len(CHATS)
        assert all((document == ends).sum() == 3 for document in documents)
        assert corpus.manifests[name].bytes == sum(map(len, WRITTEN))
    assert len(all_texts(corpus, "text")) == 30


def test_chats_need_a_template_and_one_that_takes_them(
    letters: Path, chat_tokenizer: Path, prepared: Prepared, tmp_path: Path
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [*CHATS, "no chat"], field="messages")
    with pytest.raises(ShearingError, match=r"(?s)no chat template.*chat_template\.jinja"):
        prepared({"a": str(lines)}, format="chat", tokenizer=letters)
    with pytest.raises(ShearingError, match=r"a\.jsonl:31 = .str and no list of messages"):
        prepared({"a": str(lines)}, format="chat", tokenizer=chat_tokenizer)
    corpus = prepared({"a": str(lines)}, format="chat", tokenizer=chat_tokenizer, bad_input="skip")
    assert corpus.manifests["a"].left_out == {"bad_chat": 1}


def test_special_tokens_in_texts_are_kept_where_they_are_wanted(prepared: Prepared, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [f"one {i}</s>two" for i in range(9)])
    corpus = prepared({"letters": str(lines), "tokens": {"paths": str(lines), "special_tokens": "tokens"}})
    for name, ends in (("letters", 1), ("tokens", 2)):
        tokens = corpus.tokens(name).read(0, 10**6)
        assert (tokens == 0).sum() == ends * len(corpus.document_ends(name))
    # Other tokens are another domain, not one that is there already.
    with pytest.raises(ShearingError, match="with other settings"):
        prepared({"letters": {"paths": str(lines), "special_tokens": "tokens"}})


def test_an_index_that_is_gone_is_made_again(prepared: Prepared, tmp_path: Path) -> None:
    domains = {"a": str(write_lines(tmp_path / "a.jsonl", TEXTS))}
    corpus = prepared(domains)
    before = content(corpus.path)
    (corpus.path / "corpus.json").unlink()
    (corpus.path / "tokenizer.json").unlink()
    prepared(domains)
    assert content(corpus.path) == before


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_by_a_hub_name_with_other_text_is_refused(
    streaming: bool, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    domains = {"a": {"paths": f"hf:{tmp_path / 'set'}", "streaming": streaming}}
    lines = write_lines(tmp_path / "set" / "a.jsonl", TEXTS)
    corpus = prepared(domains)
    before = content(corpus.path)
    (lines.parent / ".notes").write_text("hidden")
    prepared(domains)
    assert content(corpus.path) == before
    assert [source.checksum for source in corpus.manifests["a"].sources] == [""]
    write_lines(lines, reversed(TEXTS))  # as many bytes
    with pytest.raises(ShearingError, match="prepared from other text"):
        prepared(domains)


def test_a_folder_by_a_hub_name_that_changed_while_nobody_prepared(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    lines = [write_lines(tmp_path / "set" / f"{name}.jsonl", [f"{name}{text}" for text in TEXTS]) for name in "ab"]
    with monkeypatch.context() as patch:
        patch.setattr(steps.DecidePlaces, "do", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepared({"a": f"hf:{tmp_path / 'set'}"})
    assert len(list((tmp_path / "corpus").glob(f"{PREFIX}*/shards/*/shard.json"))) > 0
    write_lines(lines[1], [f"c{text}" for text in TEXTS])
    corpus = prepared({"a": f"hf:{tmp_path / 'set'}"})
    assert all_texts(corpus, "a") == sorted(f"{name}{text}" for name in "ac" for text in TEXTS)


def test_a_domain_that_was_deleted_is_no_longer_of_the_corpus(prepared: Prepared, tmp_path: Path) -> None:
    a, b = (write_lines(tmp_path / f"{name}.jsonl", [f"{name}{text}" for text in TEXTS]) for name in "ab")
    corpus = prepared({"a": str(a), "b": str(b)})
    shutil.rmtree(corpus.path / "b")
    # What an unfinished preparation will put there is still of the corpus.
    under_way = corpus.path / f"{PREFIX}other"
    under_way.mkdir()
    (under_way / "plan.json").write_text('{"domains": ["b"]}')
    with pytest.raises(ShearingError, match="type the command that made it"):
        prepared({"a": str(a)})
    shutil.rmtree(under_way)
    assert prepared({"a": str(a)}).domains == ["a"]
    assert Corpus.open(corpus.path).domains == ["a"]
    assert prepared({"a": str(a), "b": str(b)}).domains == ["a", "b"]


@pytest.mark.parametrize("damage", ["a file is gone", "the manifest is cut off"])
def test_a_damaged_domain_is_whole_again_as_the_error_says(prepared: Prepared, tmp_path: Path, damage: str) -> None:
    texts = {name: str(write_lines(tmp_path / f"{name}.jsonl", [f"{name}{text}" for text in TEXTS])) for name in "ab"}
    corpus = prepared(texts)
    folder = corpus.path / "b"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if damage == "a file is gone":
        (folder / "train.bin").unlink()
    else:
        (folder / "manifest.json").write_bytes(before["manifest.json"][:10])
    with pytest.raises(ShearingError, match=f"remove {folder}, then type the command that made it"):
        prepared(texts)
    shutil.rmtree(folder)
    assert prepared(texts).domains == ["a", "b"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_is_no_folder_for_a_corpus(prepared: Prepared, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "corpus").touch()
    with pytest.raises(ShearingError, match=rf"^output = '{tmp_path}/corpus'\n.*\(File exists\)"):
        prepared({"a": str(lines)})


def test_a_domain_that_is_published_while_one_looks_is_no_newcomer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, folder = tmp_path / "corpus", tmp_path / "places"
    (output / "late").mkdir(parents=True)
    folder.mkdir()
    listings = iter([[], ["late"]])  # another process of the command publishes it between two looks

    def looked_at(_: Path) -> list[str]:
        found = next(listings)
        if not found:
            (output / "late" / "manifest.json").write_text("{}")
            (folder / "late.sha256").write_text(sha256_of_file(output / "late" / "manifest.json"))
        return found

    monkeypatch.setattr("data_tools.corpus_output.domains_of", looked_at)
    monkeypatch.setattr("data_tools.preparation.decision.domains_of", looked_at)
    assert Decision(folder, output).newcomers() == []
