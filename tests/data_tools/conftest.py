"""A tokenizer of one token a character, texts in files, and how to prepare and read back a corpus of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_tools.preparation.prepare import prepare
from data_tools.preparation.recipe import load_preparation
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import SPLITS
from tests.data_tools.processes import end_all

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n</>-é"


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with one token a character, and `</s>`."""
    vocabulary = {token: i for i, token in enumerate(["</s>", "?", *LETTERS])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", model_max_length=5)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without merges: `</s>` is token 0, every byte a token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("byte-tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture
def prepared(letters: Path, tmp_path: Path) -> Callable[..., Corpus]:
    """Prepares domains into `tmp_path/corpus`, in this process unless told otherwise."""

    def run(domains: dict[str, Any], **keys: Any) -> Corpus:
        values = {"output": tmp_path / "corpus", "tokenizer": letters, "workers": 1, "domains": domains, **keys}
        options = {key: (str(value) if isinstance(value, Path) else value, key) for key, value in values.items()}
        corpus = prepare(load_preparation(None, options=options), console=Console(quiet=True))
        assert corpus is not None
        return corpus

    return run


def write_lines(path: Path, texts: Iterable[object], *, field: str = "text") -> Path:
    """JSON lines of these texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def texts_of(corpus: Corpus, domain: str, split: str) -> list[str]:
    """The documents of a split, decoded; one character a token."""
    alphabet = ["", "?", *LETTERS]
    tokens = np.fromfile(corpus.path / domain / f"{split}.bin", dtype=corpus.manifests[domain].dtype).tolist()
    texts, start = [], 0
    for end in corpus.document_ends(domain, split=split).tolist():  # type: ignore[arg-type]
        assert tokens[end - 1] == 0
        assert 0 not in tokens[start : end - 1]
        texts.append("".join(alphabet[token] for token in tokens[start : end - 1]))
        start = end
    return texts


def all_texts(corpus: Corpus, domain: str) -> list[str]:
    """The documents of all splits, sorted."""
    return sorted(text for split in SPLITS for text in texts_of(corpus, domain, split))


def distinct_texts(corpus: Corpus, domains: str) -> list[set[str]]:
    """What each split of these domains says, domains taken together."""
    return [{text for name in domains for text in texts_of(corpus, name, split)} for split in SPLITS]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
