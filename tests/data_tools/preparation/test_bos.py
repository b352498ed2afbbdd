"""The token in front of texts: put there when text is prepared, found in what was tokenised elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, processors
from typer.testing import CliRunner

from data_tools.adoption.adoption import adopt
from shearing.cli.frame import app
from shearing.data.corpus.bos import Bos
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import SPLITS
from shearing.errors import ShearingError
from tests.data_tools.conftest import LETTERS, all_texts, content, write_lines

Prepared = Callable[..., Corpus]
TEXTS = [f"text {index} <s>" for index in range(40)]


@pytest.fixture(scope="session")
def beginning(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of letters, with `<s>`, token 2 + len(LETTERS), in front of a text."""
    import json

    folder = tmp_path_factory.mktemp("beginning")
    own = Tokenizer.from_file(str(letters / "tokenizer.json"))
    own.add_special_tokens(["<s>"])
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2 + len(LETTERS))])
    own.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    return folder


BEGIN = 2 + len(LETTERS)


def _documents(corpus: Corpus) -> list[list[int]]:
    found = []
    for split in SPLITS:
        tokens, ends = corpus.tokens("a", split=split), corpus.document_ends("a", split=split).tolist()
        everything = tokens.read(0, len(tokens)).tolist()
        found += [everything[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return sorted(found)


def test_auto_does_what_the_tokenizer_does(prepared: Prepared, letters: Path, beginning: Path, tmp_path: Path) -> None:
    a = write_lines(tmp_path / "a.jsonl", TEXTS)
    plain = prepared({"a": str(a)}, tokenizer=beginning, bos="none", output=tmp_path / "none")
    begun = prepared({"a": str(a)}, tokenizer=beginning, output=tmp_path / "auto")
    assert _documents(begun) == sorted([BEGIN, *tokens] for tokens in _documents(plain))
    assert begun.bos == Bos("document", BEGIN)
    # `<s>` in a text stays three letters, of which none is the token.
    assert all(tokens.count(BEGIN) == 1 for tokens in _documents(begun))
    rows = prepared({"a": str(a)}, tokenizer=beginning, bos="row", output=tmp_path / "row")
    assert (rows.bos, _documents(rows)) == (Bos("row", BEGIN), _documents(plain))
    without = prepared({"a": str(a)}, tokenizer=letters, output=tmp_path / "letters")
    assert without.bos == Bos()
    assert all_texts(without, "a") == sorted(TEXTS)


def test_the_same_command_keeps_what_is_there_and_another_way_is_refused(
    prepared: Prepared, beginning: Path, tmp_path: Path
) -> None:
    a, b = (write_lines(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS]) for name in "ab")
    prepared({"a": str(a)}, tokenizer=beginning)
    before = content(tmp_path / "corpus")
    prepared({"a": str(a)}, tokenizer=beginning, bos="document")
    assert content(tmp_path / "corpus") == before
    for domains in ({"a": str(a)}, {"b": str(b)}):
        with pytest.raises(ShearingError, match="choose another output, or bos=document"):
            prepared(domains, tokenizer=beginning, bos="row")
    assert content(tmp_path / "corpus") == before


def test_a_corpus_of_an_earlier_version_goes_on_with_none(prepared: Prepared, beginning: Path, tmp_path: Path) -> None:
    import json

    a, b = (write_lines(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS]) for name in "ab")
    prepared({"a": str(a)}, tokenizer=beginning, bos="none")
    path = tmp_path / "corpus" / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({name: of for name, of in manifest.items() if not name.startswith("bos")}))
    with pytest.raises(ShearingError, match="or bos=none"):
        prepared({"a": str(a), "b": str(b)}, tokenizer=beginning)
    assert prepared({"a": str(a), "b": str(b)}, tokenizer=beginning, bos="none").bos == Bos()


def test_the_command_says_what_it_puts_in_front(beginning: Path, tmp_path: Path) -> None:
    a = write_lines(tmp_path / "a.jsonl", TEXTS)
    typed = ["data", "prepare", "--domain", f"a={a}", "--tokenizer", str(beginning), "--workers", "1"]
    result = CliRunner().invoke(app, [*typed, "--bos", "row", "-o", str(tmp_path / "corpus")])
    assert result.exit_code == 0, result.output
    assert "<s> stands in front of each row" in result.output
    assert Corpus.open(tmp_path / "corpus").bos == Bos("row", BEGIN)


@pytest.mark.parametrize(("begun", "expected"), [(40, Bos("document", BEGIN)), (39, Bos()), (0, Bos())])
def test_adopted_tokens_begin_as_all_their_documents_do(
    begun: int, expected: Bos, beginning: Path, tmp_path: Path
) -> None:
    documents = [[*([BEGIN] if i < begun else []), 2 + i % 26, 3 + i // 26, 0] for i in range(40)]
    path = tmp_path / "a.ds"
    np.concatenate(documents).astype("<u2").tofile(path)
    np.cumsum([len(each) for each in documents]).astype("<u8").tofile(path.with_name("a.ds.index"))
    path.with_name("a.ds.metadata").write_text("some tokenizer|2\n1\n1T")
    corpus = adopt(
        domains={"a": path},
        tokenizer=str(beginning),
        output=tmp_path / "corpus",
        validation="10%",
        test="10%",
        separator_token=None,
        console=Console(quiet=True),
    )
    assert corpus.bos == expected
    assert corpus.manifests["a"].bytes == 40 * len("a b")  # so this tokenizer decodes; of the token in front, nothing
    assert _documents(corpus) == sorted(documents)
