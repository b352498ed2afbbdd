"""Runs and exports whose models keep the tokens alone that their corpus uses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from shearing.cli.frame import app
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.data.corpus.writer import CorpusWriter
from shearing.errors import ShearingError
from shearing.models.stored.cut_vocabulary import KEPT
from shearing.models.stored.saving import write_model
from shearing.pruning.sparse.stored.check import differences
from shearing.runs.continuation.extension import change
from shearing.runs.export.export import export
from shearing.runs.export.vocabulary import cut_to_corpus
from shearing.runs.planning.hardware import Hardware
from shearing.runs.planning.plan import plan
from shearing.runs.planning.plan_tables import render
from shearing.runs.recipe import Recipe, load_recipe
from shearing.runs.stages.run import run
from tests.conftest import tiny_recipe_data
from tests.models.tiny import tiny_model
from tests.runs.export.tokenizers import write_tokenizer

ROWS = 416
WORDS = {"fox": ["quick", "brown", "fox", "jumps", "lazy", "dog"], "code": ["def", "square", "return", "print", "17"]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a byte-level tokenizer, and a corpus that uses few of its tokens."""
    folder = tmp_path_factory.mktemp("words")
    write_model(
        tiny_model(vocab_size=ROWS, hidden_size=32, num_attention_heads=4, num_key_value_heads=2), folder / "model"
    )
    raw = write_tokenizer(folder / "model", name="gpt-2")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    draw = random.Random(0)
    writer = CorpusWriter(
        folder / "corpus",
        vocab_size=len(tokenizer),
        separator_id=raw.token_to_id("</s>"),
        tokenizer="words",
        tokenizer_fingerprint=tokenizer_fingerprint(AutoTokenizer.from_pretrained(folder / "model")),
        validation_fraction=0.13,
        test_fraction=0.11,
    )
    for name, words in WORDS.items():
        with writer.domain(name, sources=["made here"], inputs=name) as domain:
            for _ in range(60):
                text = " ".join(draw.choices(words, k=20))
                domain.add(text, token_ids=raw.encode(text, add_special_tokens=False).ids)
    writer.finish()
    return folder


def recipe_of(inputs: Path, folder: Path, *, size: Any = "auto") -> Recipe:
    data = tiny_recipe_data(inputs, run_dir=folder / "run")
    data["prune"] |= {"duration": 2, "freeze": 0}
    data["pretrain"] |= {"duration": 2, "schedule": "constant"}
    data["target"] |= {"vocab_size": size}
    return Recipe.model_validate(data)


def test_a_run_leaves_both_models(inputs: Path, tmp_path: Path) -> None:
    recipe = recipe_of(inputs, tmp_path)
    directory = run(recipe)
    whole, cut = (AutoModelForCausalLM.from_pretrained(each) for each in (directory.model, directory.kept_tokens))
    record = json.loads((directory.kept_tokens / KEPT).read_text())
    kept = record["kept"]
    assert whole.config.vocab_size == ROWS
    assert len(kept) == cut.config.vocab_size < 330
    text = record["test_text"]
    assert text["documents"] == text["unchanged"] > 4
    assert text["tokens"] == text["tokens_now"]
    sentence = "def fox return lazy"
    ids, now = (
        Tokenizer.from_file(str(each / "tokenizer.json")).encode(sentence).ids
        for each in (directory.model, directory.kept_tokens)
    )
    assert ids == [kept[new] for new in now]
    with torch.no_grad():
        expected = whole(torch.tensor([ids])).logits[..., kept]
        torch.testing.assert_close(cut(torch.tensor([now])).logits, expected, rtol=0, atol=1e-5)
    # Of a finished run it changes nothing, which is said, and its recipe says what was made.
    console = Console(width=500, record=True, file=(tmp_path / "said").open("w"))
    later = recipe.model_copy(update={"target": recipe.pruning.target.model_copy(update={"vocab_size": 320})})
    later = later.model_copy(update={"model": recipe.model.model_copy(update={"save_dtype": "bf16"})})
    run(later, stages=["pretrain"], console=console)
    said = console.export_text()
    assert f"target.vocab_size=auto; to have it: shear export {directory.path} -o NEW_DIR --vocab-size 320" in said
    assert f"shear export {directory.path} -o NEW_DIR --dtype bf16" in said
    assert load_recipe(directory.recipe) == recipe
    later = later.model_copy(update={"target": recipe.pruning.target.model_copy(update={"vocab_size": None})})
    run(later, stages=["pretrain"], console=console)
    assert f"{directory.model} has all tokens" in console.export_text()
    # Evaluation is of the whole vocabulary; a longer run begins with it too, and keeps what there was.
    assert json.loads(directory.evaluation.read_text())["models"]["final"]["shape"]["vocab_size"] == ROWS
    change(directory, overrides=["pretrain.duration=3"])
    assert (directory.path / "model-kept-tokens-step-00000002" / KEPT).is_file()
    run(load_recipe(directory.recipe), stages=["pretrain"])
    assert (directory.kept_tokens / KEPT).is_file()


def test_the_card_gives_a_cut_model_no_losses_of_another(inputs: Path, tmp_path: Path) -> None:
    data = recipe_of(inputs, tmp_path, size=None).model_dump(mode="json")
    del data["target"], data["prune"]
    directory = run(Recipe.model_validate(data))
    cards = []
    for name, size in (("whole", None), ("cut", 320)):
        made = export(str(directory.path), output=tmp_path / name, vocab_size=size, console=Console(quiet=True))
        cards.append((made.folder / "README.md").read_text())
    whole, cut = cards
    label = json.loads(directory.evaluation.read_text())["models"]["final"]["label"]
    assert f"The column of this model is `{label}`" in whole
    assert "Vocabulary" not in whole
    assert "The column of this model is" not in cut
    assert f"measured before the vocabulary was cut from {ROWS} tokens to 320; the column of the whole model" in cut
    assert f"- Vocabulary: 320 of {ROWS} tokens kept; " in cut
    assert "test documents have the same tokens" in cut


def test_it_is_refused_before_any_work(tiny_inputs: Path, inputs: Path, tmp_path: Path) -> None:
    for at, said in ((tiny_inputs, "WordLevel"), (inputs, r"target\.vocab_size = 100")):
        with pytest.raises(ShearingError, match=said):
            run(recipe_of(at, tmp_path, size=100))
        assert not (tmp_path / "run" / "prune").exists()


def test_the_plan_says_what_tokens_take(inputs: Path, tmp_path: Path) -> None:
    made = plan(
        recipe_of(inputs, tmp_path, size=320), hardware=Hardware.of(processes=1, gpu=None, gigabytes=80, mfu=0.4)
    )
    console = Console(width=300, record=True, file=(tmp_path / "said").open("w"))
    console.print(render(made))
    source = AutoModelForCausalLM.from_pretrained(inputs / "model")
    share = ROWS * 32 / sum(parameter.numel() for parameter in source.parameters())
    said = console.export_text()
    assert f"embedding and head: {share:.0%} of the source" in said
    assert "of the target with 320 tokens" in said


def test_an_export_is_cut_and_has_a_gguf_file(inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    arguments = ["export", str(inputs / "model"), "-o", str(tmp_path / "out"), "--vocab-size", "320"]
    refused = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert "error: --corpus" in refused.output
    arguments += ["--corpus", str(inputs / "corpus"), "--gguf", "f32"]
    said = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert said.exit_code == 0, said.output
    assert f"320 of {ROWS} tokens kept; " in said.stdout
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model-f32.gguf")
    assert opened.config.vocab_size == 320
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(again) == 320


def test_a_sparse_model_keeps_its_masks(inputs: Path, tmp_path: Path) -> None:
    data = tiny_recipe_data(inputs, run_dir=tmp_path / "run")
    del data["target"], data["prune"]
    data |= {"sparsify": {"criterion": "magnitude", "pattern": "2:4"}}
    data["pretrain"] |= {"duration": 1, "lora": {"rank": 2}}
    directory = run(Recipe.model_validate(data), stages=["sparsify", "pretrain"])
    made = export(str(directory.path), output=tmp_path / "out", vocab_size="auto", console=Console(quiet=True))
    assert made.vocabulary is not None
    assert made.shape.vocab_size == made.vocabulary.rows < ROWS
    assert differences(tmp_path / "out") == []
    stored = directory.model / "masks.packed"
    save_file({**load_file(stored), "lm_head.weight": torch.zeros(1)}, tmp_path / "masks")
    with pytest.raises(ShearingError, match=r"masks of lm_head\.weight"):
        cut_to_corpus(
            tmp_path / "out",
            corpus=Corpus.open(inputs / "corpus"),
            size="auto",
            whole=AutoModelForCausalLM.from_pretrained(directory.model).eval(),
            masks=tmp_path / "masks",
        )


def test_a_sparse_run_may_have_a_target_too(inputs: Path, tmp_path: Path) -> None:
    data = recipe_of(inputs, tmp_path).model_dump(mode="json")
    data["sparsify"] = {"criterion": "magnitude", "pattern": "2:4"}
    directory = run(Recipe.model_validate(data), stages=["prune", "compact", "sparsify", "pretrain"])
    assert differences(directory.kept_tokens) == differences(directory.model) == []
