"""What the checks and the stages of a run share is opened and resolved once."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

import shearing
from shearing.data.corpus.corpus import Corpus
from shearing.errors import ShearingError
from shearing.runs import context as module
from shearing.runs.context import RunContext
from shearing.runs.planning.preflight import preflight
from shearing.runs.recipe import load_recipe


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often what takes time, or what may differ from one time to the next, is called."""
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **keywords: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **keywords)

        return count

    for owner, name in ((Corpus, "open"), (AutoTokenizer, "from_pretrained")):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    for name in ("resolve_device", "resolve_precision", "load_config"):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return counts


def test_a_whole_run_opens_the_corpus_and_its_tokenizer_once(tiny_recipe: Path, calls: Counter[str]) -> None:
    shearing.run(
        load_recipe(tiny_recipe, overrides=["evaluation.baselines=[random, activations]"]),
        console=Console(file=io.StringIO()),
    )
    assert calls == dict.fromkeys(("open", "from_pretrained", "resolve_device", "resolve_precision", "load_config"), 1)


@pytest.mark.parametrize(
    ("keys", "opened"),
    [
        ([], 1),
        (["sparsify.calibration=[TEXT]"], 1),
        (["data.domains=[digits, letters]"], 3),  # the whole corpus by the checks and by the stage
    ],
    ids=["the run's corpus", "a file of text", "more than the run's domains"],
)
def test_one_shot_sparsity_reads_what_the_run_has_open(
    tiny_recipe: Path, tmp_path: Path, calls: Counter[str], keys: list[str], opened: int
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcd0123" * 100)
    sparsify = ["sparsify.criterion=wanda", "sparsify.pattern='2:4'", "sparsify.samples=4", "sparsify.seqlen=16"]
    overrides = [*sparsify, *(key.replace("TEXT", str(text)) for key in keys)]
    shearing.run(load_recipe(tiny_recipe, overrides=overrides), console=Console(file=io.StringIO()))
    assert (calls["open"], calls["from_pretrained"]) == (opened, 1)


def test_what_the_checks_have_opened_is_handed_on(tiny_recipe: Path, calls: Counter[str]) -> None:
    context = RunContext(load_recipe(tiny_recipe))
    preflight(context)
    opened = context.corpus
    assert context.initial_mixture().corpus is opened
    assert context.initial_mixture() is not context.initial_mixture()
    assert (calls["open"], calls["from_pretrained"]) == (1, 1)


def test_nothing_is_resolved_before_it_is_asked_for(tiny_recipe: Path, calls: Counter[str]) -> None:
    context = RunContext(load_recipe(tiny_recipe, overrides=["model.source=nowhere", "data.corpus=nowhere"]))
    assert context.document_rules.loss_across
    assert not context.document_rules.attention_within
    assert context.precision == torch.float32
    assert calls == {"resolve_device": 1, "resolve_precision": 1}
    for _ in range(2):  # a mistake is said each time
        with pytest.raises(ShearingError, match="nowhere"):
            _ = context.corpus


def test_a_model_without_a_tokenizer_says_so(tiny_recipe: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((tiny_inputs / "model" / "config.json").read_text())
    context = RunContext(load_recipe(tiny_recipe, overrides=[f"model.source={tmp_path / 'model'}"]))
    with pytest.raises(ShearingError, match="a model with its tokenizer beside it"):
        _ = context.tokenizer
