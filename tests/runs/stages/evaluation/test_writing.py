"""What models of a run write: prompts of test text, figures, what is kept and what is shown."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shearing.runs.context import RunContext
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.evaluate import evaluate
from shearing.runs.stages.evaluation import writing
from shearing.runs.stages.run import run
from tests.conftest import tiny_recipe_data

GENERATION = {"prompts": 5, "prompt_tokens": 8, "tokens": 12, "text_tokens": 48}


@pytest.fixture(scope="module")
def finished(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run that is complete but for its evaluation."""
    data = tiny_recipe_data(tiny_inputs, run_dir=tmp_path_factory.mktemp("writing") / "run")
    data["evaluation"] |= {"generation": GENERATION}
    recipe = Recipe.model_validate(data)
    run(recipe, stages=["prune", "compact", "pretrain"], console=Console(file=io.StringIO()))
    return recipe


def quiet(recipe: Recipe) -> RunContext:
    return RunContext(recipe, console=Console(file=io.StringIO(), width=80))


def having(recipe: Recipe, **generation: Any) -> Recipe:
    changed = recipe.evaluation.generation.model_copy(update=generation)
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"generation": changed})})


def test_source_and_models_of_the_run_write_after_beginnings_of_test_documents(finished: Recipe) -> None:
    context = quiet(finished)
    evaluation = evaluate(context)
    written = {name: model["generation"] for name, model in evaluation["models"].items() if "generation" in model}
    assert list(written) == ["source", "compact", "final"]
    assert written["source"]["agreement"] is None
    for name in ("compact", "final"):
        assert 0 <= written[name]["agreement"] <= 1
        assert written[name]["kl_from_source"] > 0
        assert written[name]["tokens"] == 2 * 48
    for found in written.values():
        for way in ("greedy", "sampled"):
            assert list(found[way]["distinct"]) == ["1", "2", "3", "4"]
            assert len(found[way]["shown"]) == 2
            assert 0 < found[way]["tokens"] <= 5 * 12
    assert [prompt["domain"] for prompt in evaluation["prompts"]] == ["digits", "letters"]
    for prompt, domain in zip(evaluation["prompts"], ("digits", "letters"), strict=True):
        ids = context.tokenizer.encode(prompt["text"].replace(" ", ""), add_special_tokens=False)
        ends = context.corpus.document_ends(domain, split="test").tolist()
        tokens = context.corpus.tokens(domain, split="test")
        assert len(ids) == 8
        assert ids in [list(tokens.read(start, start + 8)) for start in [0, *ends[:-1]]]
    printed = " ".join(context.console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "Its likeliest next token is the source's in" in printed
    assert "Writing greedily, it repeats" in printed


def test_nothing_is_written_twice_until_something_changes(finished: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    original = writing.continuations

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(None)
        return original(*arguments, **keywords)

    first = evaluate(quiet(finished))
    monkeypatch.setattr(writing, "continuations", counted)
    again = evaluate(quiet(finished))
    assert again["models"] == first["models"]
    assert calls == []
    (RunDirectory(finished.run_dir).model / "model.safetensors").touch()
    evaluate(quiet(finished))
    assert len(calls) == 1
    evaluate(quiet(having(finished, tokens=5)))
    assert len(calls) == 4
    without = evaluate(quiet(having(finished, prompts=0)))
    assert len(calls) == 4
    assert "prompts" not in without
    assert not any("generation" in model for model in without["models"].values())


def test_documents_that_are_too_short_are_no_prompts(finished: Recipe) -> None:
    evaluation = evaluate(quiet(having(finished, prompt_tokens=31)))
    assert evaluation["prompts"] == []
    assert evaluation["models"]["final"]["generation"]["agreement"] is not None
    assert "greedy" not in evaluation["models"]["final"]["generation"]
