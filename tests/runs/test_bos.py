"""Runs over texts that begin with a token: all that reads rows reads the same ones, and other corpora are refused."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, processors
from typer.testing import CliRunner, Result

from shearing.cli.frame import app
from shearing.data.corpus.bos import Bos
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.writer import CorpusWriter
from shearing.errors import ShearingError
from shearing.files.durable import read_json
from shearing.models.loading import load_source
from shearing.models.tokenizer import load_tokenizer
from shearing.objectives.teacher_cache.cache import TeacherCache
from shearing.pruning.calibration.text import load_calibration
from shearing.pruning.sparse.one_shot import sparsify
from shearing.pruning.sparse.recipe import SparsifyRecipe
from shearing.runs.context import RunContext
from shearing.runs.planning.preflight import preflight
from shearing.runs.recipe import Recipe
from shearing.runs.stages.evaluation.rows import rows_of
from shearing.runs.stages.evaluation.writing import measure_writing
from shearing.runs.stages.run import run
from shearing.runs.teacher_cache import Asked, write
from shearing.training.recipe import TrainingRecipe
from tests.conftest import DOMAINS, tiny_recipe_data

QUIET = Console(file=io.StringIO())
BEGIN = 0
"""`<unk>` of the tiny tokenizer, which here stands in front of texts."""

END = 1
"""Its separator."""


@pytest.fixture(scope="module")
def inputs(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose tokenizer begins texts with a token, and the same texts begun in each of the ways."""
    import random

    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(tiny_inputs / "model", folder / "model")
    path = folder / "model" / "tokenizer.json"
    own = Tokenizer.from_file(str(path))
    own.post_processor = processors.TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", BEGIN)])
    own.save(str(path))
    fingerprint = Corpus.open(tiny_inputs / "corpus").manifests["letters"].tokenizer_fingerprint
    for mode in ("none", "document", "row"):
        draw = random.Random(0)
        writer = CorpusWriter(
            folder / mode,
            vocab_size=20,
            separator_id=1,
            tokenizer="tiny",
            tokenizer_fingerprint=fingerprint,
            validation_fraction=0.13,
            test_fraction=0.11,
            bos=Bos(mode, None if mode == "none" else BEGIN),
        )
        for name, alphabet in DOMAINS.items():
            with writer.domain(name, sources=["made here"], inputs=name) as domain:
                for _ in range(60):
                    text = "".join(draw.choices(alphabet, k=30))
                    domain.add(text, token_ids=own.encode(text, add_special_tokens=False).ids)
        writer.finish()
    return folder


def _recipe(inputs: Path, run_dir: Path, *, mode: str, bos: str = "auto", **keys: str) -> Recipe:
    data = tiny_recipe_data(inputs, run_dir=run_dir)
    data["data"] |= {"corpus": str(inputs / mode), "bos": bos, **keys}
    data["evaluation"]["generation"] = {"prompts": 2, "prompt_tokens": 4, "tokens": 4, "text_tokens": 64}
    return Recipe.model_validate(data)


@pytest.mark.parametrize("mode", ["document", "row"])
def test_a_run_reads_rows_that_begin_as_the_corpus_says(mode: str, inputs: Path, tmp_path: Path) -> None:
    recipe = _recipe(inputs, tmp_path / "run", mode=mode)
    run(recipe, console=QUIET)
    evaluation = read_json(tmp_path / "run" / "evaluation.json")
    assert {"source", "final"} <= evaluation["models"].keys()
    context = RunContext(recipe, console=QUIET)
    assert context.initial_mixture().documents.loss_across is (mode == "row")
    [first, *_] = context.calibration_batches()
    if mode == "row":
        assert (first.tokens[:, 0] == BEGIN).all()
    else:
        assert (first.tokens == BEGIN).any()
    tokens = {name: of["tokens"] for name, of in evaluation["models"]["source"]["domains"].items()}
    whole = dict.fromkeys(DOMAINS, 64)
    assert evaluation["models"]["final"]["generation"]["tokens"] == sum(tokens.values())
    assert tokens == whole if mode == "row" else all(60 <= count < 64 for count in tokens.values())


@pytest.mark.parametrize(
    ("mode", "attention", "front"),
    [
        ("none", "full", [END]),
        ("document", "full", [END, BEGIN]),
        ("document", "documents", [BEGIN]),
        ("row", "full", [BEGIN, END]),
        ("row", "documents", [BEGIN]),
    ],
)
def test_prompts_come_after_what_documents_come_after_in_training(
    mode: str, attention: str, front: list[int], inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = RunContext(_recipe(inputs, tmp_path / "run", mode=mode, bos=mode, attention=attention), console=QUIET)
    model = load_source(str(inputs / "model"))
    read: list[torch.Tensor] = []
    generate: Any = model.generate

    def recorded(prompts: torch.Tensor, **keys: Any) -> Any:
        read.append(prompts)
        return generate(prompts, **keys)

    monkeypatch.setattr(model, "generate", recorded)
    source = replace(rows_of(context)[0], load=lambda: model)
    measure_writing(context, [source], results={"source": {}})
    assert len(read) == 2
    for prompts in read:
        assert prompts[:, : len(front)].tolist() == [front] * 2
        text = prompts[:, len(front) :]
        assert text.shape[1] == 4 - (mode == "document")
        assert not torch.isin(text, torch.tensor([BEGIN, END])).any()


@pytest.mark.parametrize(
    ("mode", "bos", "mend"),
    [
        ("none", "auto", "prepare the text again with bos=auto, or set data.bos=none"),
        ("none", "row", "prepare the text again with bos=row, or set data.bos=none"),
        ("row", "none", "prepare the text again with bos=none, or set data.bos=row"),
        ("document", "row", "prepare the text again with bos=row, or set data.bos=document"),
    ],
)
def test_a_corpus_that_begins_otherwise_is_refused_before_work(
    mode: str, bos: str, mend: str, inputs: Path, tmp_path: Path
) -> None:
    def check(bos: str) -> None:
        preflight(RunContext(_recipe(inputs, tmp_path / "run", mode=mode, bos=bos), console=QUIET))

    with pytest.raises(ShearingError) as raised:
        check(bos)
    assert (raised.value.field, raised.value.mend) == ("data.bos", f"{mend} to take the corpus as it is")
    check(mode)


def test_a_teachers_cache_is_of_the_rows_that_are_read(inputs: Path, tmp_path: Path) -> None:
    training = TrainingRecipe.model_validate({"precision": "fp32", "device": "cpu"})
    values: dict[str, Any] = {"model": str(inputs / "model"), "corpus": inputs / "row", "output": tmp_path / "cache"}
    write(Asked(**values, sequence_length=16, micro_batch_size=4, training=training, top_k=3, rows=6), console=QUIET)
    opened, corpus = TeacherCache.open(tmp_path / "cache"), Corpus.open(inputs / "row")
    model = load_source(str(inputs / "model"))
    for domain in DOMAINS:
        for row in opened.rows(domain).tolist():
            tokens = torch.from_numpy(corpus.row(domain, row, sequence_length=16))[None]
            assert tokens[0, 0] == BEGIN
            with torch.no_grad():
                log_p = model(tokens[:, :-1]).logits[0].log_softmax(-1)
            said = opened.row(domain, row)
            assert said is not None
            expected = -log_p.gather(1, tokens[0, 1:, None])[:, 0]
            torch.testing.assert_close(torch.from_numpy(said.label_losses.copy()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "command",
    [
        ["data", "teacher", "CORPUS", "--rows", "2"],
        ["data", "reference-loss", "measure", "--corpus", "CORPUS", "--tokens", "16"],
    ],
)
def test_commands_refuse_a_corpus_that_begins_otherwise(command: list[str], inputs: Path, tmp_path: Path) -> None:
    def result(mode: str, *more: str) -> Result:
        told = [str(inputs / mode) if word == "CORPUS" else word for word in command]
        told += ["--model", str(inputs / "model"), "-o", str(tmp_path / "out"), "--sequence-length", "16"]
        return CliRunner().invoke(app, [*told, "--device", "cpu", "--precision", "fp32", *more])

    for mode, more in (("none", ()), ("row", ("--bos", "document"))):
        refused = result(mode, *more)
        assert refused.exit_code == 2
        assert f"set --bos={mode} to take the corpus as it is" in " ".join(refused.stderr.split())
    assert "--bos = 'both'" in result("none", "--bos", "both").stderr
    assert not (tmp_path / "out").exists()
    assert result("none", "--bos", "none").exit_code == 0


def test_a_mixture_of_experts_is_made_of_a_corpus_that_is_taken_as_it_is(inputs: Path, tmp_path: Path) -> None:
    arguments = ["moe", str(inputs / "model"), "--experts", "6", "--active", "2", "-o", str(tmp_path / "mixture")]
    arguments += ["--calibration", str(inputs / "none"), "--samples", "4", "--seqlen", "16"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "set --bos=none to take the corpus as it is" in " ".join(refused.stderr.split())
    taken = CliRunner().invoke(app, [*arguments, "--bos", "none"])
    assert taken.exit_code == 0, taken.output


def test_calibration_begins_as_the_tokenizer_does(inputs: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(inputs / "model"))
    (tmp_path / "a.txt").write_text("abcd" * 50)
    (tmp_path / "b.txt").write_text("0123" * 50)
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]

    def tokens(paths: list[Path], bos: str) -> Any:
        chosen: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": 20, "samples": 20, "seqlen": 16, "seed": 0}
        return load_calibration(paths, bos=bos, **chosen).tokens  # type: ignore[arg-type]

    assert (tokens(files, "none") != BEGIN).all()
    assert torch.equal(tokens(files, "auto"), tokens(files, "document"))
    assert 1 <= (tokens(files, "auto") == BEGIN).sum() <= 2
    begun = tokens(files, "row")
    assert begun.shape == (20, 16)
    assert (begun[:, 0] == BEGIN).all()
    assert (begun[:, 1:] != BEGIN).all()
    rows = tokens([inputs / "row"], "auto")
    assert (rows[:, 0] == BEGIN).all()
    assert (rows[:, 1:] != BEGIN).all()
    with pytest.raises(ShearingError, match="bos = "):
        tokens([inputs / "none"], "auto")
    assert (tokens([inputs / "none"], "none") != BEGIN).all()


def test_sparsity_is_compared_on_a_corpus_that_begins_as_it_does(inputs: Path, tmp_path: Path) -> None:
    def recipe(evaluate: str) -> SparsifyRecipe:
        return SparsifyRecipe.model_validate(
            {
                "model": str(inputs / "model"),
                "output": tmp_path / "sparse",
                "criterion": "magnitude",
                "pattern": "2:4",
                "seqlen": 16,
                "device": "cpu",
                "evaluate": inputs / evaluate,
            }
        )

    with pytest.raises(ShearingError, match="bos = "):
        sparsify(recipe("none"), console=QUIET)
    assert not (tmp_path / "sparse").exists()
    sparsify(recipe("row"), console=QUIET)
