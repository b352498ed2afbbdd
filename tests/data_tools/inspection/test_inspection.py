from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner

from data_tools.inspection import inspection
from data_tools.inspection.inspection import Inspection, inspect
from shearing.cli.frame import app
from shearing.data.corpus.format import SPLITS, DomainManifest, tokenizer_fingerprint
from shearing.data.corpus.writer import CorpusWriter
from shearing.files.checksums import sha256_of_file
from shearing.runs.recipe import load_recipe

Texts = Mapping[str, Sequence[str]]
Write = Callable[[Texts], Path]


@pytest.fixture
def write(tmp_path: Path, byte_tokenizer: Path) -> Write:
    """Writes a corpus of texts; a byte is a token."""

    def write(domains: Texts) -> Path:
        loaded = AutoTokenizer.from_pretrained(byte_tokenizer)
        writer = CorpusWriter(
            tmp_path / "corpus",
            vocab_size=257,
            separator_id=0,
            tokenizer="bytes",
            tokenizer_fingerprint=tokenizer_fingerprint(loaded.backend_tokenizer),
            validation_fraction=0.1,
            test_fraction=0.1,
        )
        for name, texts in domains.items():
            with writer.domain(name, sources=["made up"], inputs=name) as domain:
                for text in texts:
                    domain.add(text, token_ids=loaded.encode(text, add_special_tokens=False))
        writer.finish()
        loaded.backend_tokenizer.save(str(tmp_path / "corpus" / "tokenizer.json"))
        return tmp_path / "corpus"

    return write


def looked(path: Path, **settings: object) -> Inspection:
    defaults = {"recipe": None, "longest_document": 10_000, "seed": 0, "console": Console(quiet=True)}
    return inspect(path, **(defaults | settings))  # type: ignore[arg-type]


def words(name: str, count: int) -> list[str]:
    return [f"{name} has its document number {i}" for i in range(count)]


def test_figures(write: Write) -> None:
    texts = {"books": [*words("books", 60), *words("books", 10)], "code": [*words("code", 30), *words("books", 5)]}
    found = looked(write(texts))
    assert found.decodable
    assert found.problems == []
    assert dict(found.duplicates.within) == {"books": 10, "code": 0}
    assert dict(found.duplicates.across) == {"books": 10, "code": 5}
    for name, domain in found.domains.items():
        assert sorted(domain.lengths.tolist()) == sorted(len(text) + 1 for text in texts[name])
        assert not domain.lengths_sampled
        assert domain.tokens_read == domain.manifest.train.tokens
        assert set(domain.texts) <= set(texts[name])
    assert sum(domain.share for domain in found.domains.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("spam " + "a" * 300, r"token \d+ stands 300 times in a row"),
        ("b " * 9000, "a document of 18,00. tokens"),
        ("cafÃ© â€œde lâ€™EuropeÂ\u00a0» " * 300, "of a wrong encoding"),
        ("broken \ufffd\ufffd\ufffd text " * 300, "of a wrong encoding"),
        ("ababababab" * 900, "token .* is .*% of"),
    ],
)
def test_problems(write: Write, text: str, problem: str) -> None:
    found = looked(write({"good": words("good", 50), "bad": [f"{text} {i}" for i in range(20)]}))
    assert found.domains["good"].problems == []
    assert any(re.search(problem, each) for each in found.domains["bad"].problems), found.problems


def test_splits_that_are_far_from_what_was_asked_for(write: Write) -> None:
    found = looked(write({"good": words("good", 50), "long": ["abcdefghij " * 800, *words("long", 12)]}))
    assert found.domains["good"].problems == []
    assert found.domains["long"].manifest.train.tokens > 8_800
    assert [re.sub("[0-9][0-9,]* ", "# ", each) for each in found.domains["long"].problems] == [
        f"{split} has # of # tokens, where # were asked for (10%)" for split in ("validation", "test")
    ]


def test_good_text_in_other_languages_is_no_problem(write: Write) -> None:
    languages = ["Être naïve à Zürich coûte cher", "東京は日本の首都です", "Москва столица", "ÂNGELA É ÃO", "🙂 emoji"]
    found = looked(write({"world": [f"{text} {i}" for i in range(30) for text in languages]}))
    assert found.problems == []


def test_leaks(write: Write) -> None:
    path = write({"books": words("books", 60), "code": words("code", 60)})
    train, *held_out = (np.load(path / "books" / f"{split}_hashes.npy") for split in SPLITS)
    train[:2] = [each[0] for each in held_out]
    np.save(path / "books" / "train_hashes.npy", train)
    manifest = path / "books" / "manifest.json"
    content = manifest.read_text()
    before = DomainManifest.read(path / "books").train.hashes_sha256
    manifest.write_text(content.replace(before, sha256_of_file(path / "books" / "train_hashes.npy")))
    found = looked(path)
    assert found.duplicates.leaked["books"] == 2
    [problem] = found.problems
    assert problem.startswith("books: 2 validation or test documents are in training text")


def test_big_corpora_are_sampled(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write({"books": words("books", 400) * 2, "code": words("code", 300)})
    monkeypatch.setattr(inspection, "MOST_LENGTHS", 50)
    monkeypatch.setattr(inspection, "MOST_HASHES", 400)
    monkeypatch.setattr(inspection, "TOKENS_OF_PIECE", 100)
    found = looked(path)
    books = found.domains["books"]
    assert books.lengths_sampled
    assert len(books.lengths) <= 50
    assert books.tokens_read == 64 * 100
    assert found.duplicates.sampled == pytest.approx(400 / 1100)
    # Equal texts are looked at together or not at all, so the share of duplicates is that of the corpus.
    assert found.duplicates.within["books"] == pytest.approx(400 * 400 / 1100, rel=0.2)
    assert found.duplicates.within["code"] == 0
    result = CliRunner().invoke(app, ["data", "inspect", str(path)], env={"COLUMNS": "300"})
    assert "from a sample" in result.output
    assert "36.4% of all texts" in result.output


def test_planned_use(write: Write, tmp_path: Path) -> None:
    path = write({"books": words("books", 60), "code": words("code", 600)})
    overrides = [
        f"data.corpus={path}",
        "data.domains=null",
        "data.sequence_length=16",
        "mixture.initial_weights=uniform",
        "prune.duration=10 steps",
        "prune.batch_size=4",
        "pretrain.duration=90 steps",
        "pretrain.batch_size=8",
    ]
    recipe = load_recipe("recipes/demo.yaml", overrides=overrides)
    found = looked(path, recipe=recipe)
    planned = (10 * 4 + 90 * 8) * 16 / 2
    for name, domain in found.domains.items():
        assert domain.passes == pytest.approx(planned / found.domains[name].manifest.train.tokens)
    [problem] = found.problems
    assert problem.startswith("books: smaller than its planned use: the recipe reads it")


@pytest.mark.parametrize("columns", [50, 100, 120, 300])
def test_nothing_is_cut_off(columns: int, write: Write) -> None:
    path = write({"a_name_of_many_letters": words("books", 200), "code": words("code", 60)})
    result = CliRunner().invoke(app, ["data", "inspect", str(path)], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    assert "…" not in result.output
    tokens = DomainManifest.read(path / "a_name_of_many_letters").train.tokens
    for shown in ("a_name_of_many_letters", "training tokens", f"{tokens:,}", "also elsewhere", "left out"):
        assert shown in result.output
    assert ("┃" in result.output) == (columns == 300)


def test_the_command(write: Write, tmp_path: Path) -> None:
    path = write(
        {f"domain_{i:02d}": words(str(i), 20 + i) for i in range(30)}
        | {"long": ["abcdefghij " * 1000, *words("long", 200)]}
    )

    def invoke(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["data", "inspect", str(path), *arguments], env={"COLUMNS": "300"})
        return result.exit_code, result.output

    code, output = invoke("--samples", "1", "--output", str(tmp_path / "corpus.png"))
    assert code == 0, output
    assert "no problems found" in output
    assert "12 has its document number" in output
    assert (tmp_path / "corpus.png").read_bytes().startswith(b"\x89PNG")
    assert invoke("--samples", "1")[1].splitlines()[:30] == output.splitlines()[:30]
    assert invoke("--longest-document", "1000")[0] == 0
    code, output = invoke("--longest-document", "1000", "--strict")
    assert code == 1
    assert "long: a document of" in output
    assert invoke("--output", "corpus.gif")[0] == 2
    (path / "tokenizer.json").unlink()
    assert "there is no tokenizer.json" in invoke()[1]
