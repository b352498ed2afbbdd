"""`shear data reference-loss`: tables that grow, laws that are fitted, files that a recipe reads."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from shearing.cli.frame import app
from shearing.data.mixture.reference import resolve_reference
from shearing.data.recipe import MixtureRecipe
from shearing.errors import ShearingError
from shearing.evaluation.reference_losses import measure as measure_losses
from shearing.evaluation.reference_losses.fit import fit_reference
from shearing.evaluation.reference_losses.table import Conditions, LossRow, LossTable
from shearing.runs.context import RunContext
from shearing.runs.recipe import load_recipe
from shearing.runs.stages.prune import prune
from tests.repository import RECIPES

PUBLISHED = RECIPES / "reference" / "llama2-redpajama.json"


def shear(*arguments: str | Path) -> Result:
    command = ["data", "reference-loss", *map(str, arguments)]
    return CliRunner().invoke(app, command, env={"COLUMNS": "200"})


def error_of(*arguments: str | Path) -> str:
    result = shear(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.fixture(scope="module")
def family(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four random models of the tiny tokenizer, each wider than the one before."""
    folder = tmp_path_factory.mktemp("family")
    models = []
    for width in (16, 32, 48, 64):
        path = folder / f"w{width}"
        shutil.copytree(tiny_inputs / "model", path)
        config = LlamaConfig.from_pretrained(path)
        config.hidden_size = width
        LlamaForCausalLM(config).save_pretrained(path)
        models.append(path)
    return models


def measure(inputs: Path, table: Path, *models: Path, **options: object) -> Result:
    given = {"sequence-length": 16, "tokens": 64, "device": "cpu", "precision": "fp32", **options}
    extra = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    named = [part for model in models for part in ("--model", str(model))]
    return shear("measure", "--corpus", inputs / "corpus", "-o", table, *named, *extra)


def test_a_table_grows_and_is_continued(
    tiny_inputs: Path, family: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.json"
    load, loaded = measure_losses.load_source, []

    def stops_at_the_third(model: str, **arguments: Any) -> Any:
        loaded.append(model)
        if len(loaded) == 3:
            raise KeyboardInterrupt
        return load(model, **arguments)

    monkeypatch.setattr(measure_losses, "load_source", stops_at_the_third)
    assert measure(tiny_inputs, table, *family).exit_code != 0
    assert len(LossTable.read(table).rows) == 2
    again = measure(tiny_inputs, table, *family)
    assert again.exit_code == 0, again.output
    assert again.stdout.count("already") == 2
    assert len(loaded) == 5
    read = LossTable.read(table)
    assert [row.model for row in read.rows] == [str(path) for path in family]
    assert read.conditions is not None
    assert read.conditions.sequence_length == 16
    assert (read.conditions.attention, read.conditions.loss_across_documents) == ("full", True)
    # A table of a version that did not say so goes on, and goes on saying nothing.
    older = json.loads(table.read_text())
    for name in ("attention", "loss_across_documents"):
        del older["conditions"][name]
    older["rows"].pop()
    table.write_text(json.dumps(older))
    assert measure(tiny_inputs, table, *family).exit_code == 0
    older = LossTable.read(table)
    assert older.rows == read.rows
    assert older.conditions is not None
    assert older.conditions.attention is None
    assert read.rows[0].tokens == {"digits": 64, "letters": 64}
    sizes = [LlamaForCausalLM.from_pretrained(path).num_parameters() for path in family]
    assert [row.parameters for row in read.rows] == sizes


def test_the_sources_own_loss_is_what_a_run_measures(tiny_inputs: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "reference.json"
    result = shear("source", tiny_recipe, "-o", output)
    assert result.exit_code == 0, result.output
    prune(RunContext(load_recipe(tiny_recipe), console=Console(file=io.StringIO())))
    by_run = json.loads((load_recipe(tiny_recipe).run_dir / "prune" / "reference.json").read_text())
    written = json.loads(output.read_text())
    assert written["losses"] == by_run
    assert written["conditions"]["attention"] == "full"
    assert written["conditions"]["loss_across_documents"] is True
    table = tmp_path / "table.json"
    assert measure(tiny_inputs, table, tiny_inputs / "model").exit_code == 0
    assert LossTable.read(table).rows[0].losses == pytest.approx(by_run, rel=1e-6)


def test_other_conditions_and_other_tokenizers_are_refused(
    tiny_inputs: Path, family: list[Path], tmp_path: Path
) -> None:
    table = tmp_path / "table.json"
    assert measure(tiny_inputs, table, family[0]).exit_code == 0
    before = table.read_bytes()
    for options, expected in (
        ({"sequence-length": 8}, "sequence_length 16"),
        ({"tokens": 32}, "tokens_per_domain 32"),
        ({"precision": "bf16"}, "precision float32"),
    ):
        result = measure(tiny_inputs, table, family[1], **options)
        assert result.exit_code == 2
        assert expected in result.stderr
    other = tmp_path / "other"
    shutil.copytree(family[1], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = measure(tiny_inputs, table, family[1], other)
    assert result.exit_code == 2
    assert "two tokenizers cannot be compared" in result.stderr
    # Nothing was measured before all were checked.
    assert table.read_bytes() == before
    assert (
        "at most 64, the positions of"
        in measure(tiny_inputs, tmp_path / "new", family[1], **{"sequence-length": 70}).stderr
    )
    assert "positive numbers" in measure(tiny_inputs, table, family[1], tokens=0).stderr
    assert "auto, cpu, cuda" in measure(tiny_inputs, table, family[1], device="gpu").stderr
    assert "--model = " in measure(tiny_inputs, table, tmp_path / "absent").stderr


def test_published_losses_make_the_recipes_references(tmp_path: Path) -> None:
    for name in ("1.3b", "2.7b"):
        recipe = load_recipe(RECIPES / f"sheared-llama-{name}.yaml")
        rows = json.loads(PUBLISHED.read_text())["published_predictions"]
        (row,) = (row for row in rows if row["model"] == name.upper())
        assert recipe.mixture.reference == row["losses"]
        output = tmp_path / f"{name}.json"
        assert "--extrapolate" in error_of("fit", PUBLISHED, "--at", row["parameters"])
        result = shear("fit", PUBLISHED, "--at", row["parameters"], "--extrapolate", "--unbounded", "-o", output)
        assert result.exit_code == 0, result.output
        resolved = resolve_reference(MixtureRecipe(reference=output), domains=row["losses"], measure_source=dict)
        assert resolved == pytest.approx(row["losses"], abs=0.5e-4 + 1e-9)
        written = json.loads(output.read_text())
        assert written["extrapolated_by"] == pytest.approx(6_738_415_616 / row["parameters"])
        assert written["table"]["models"]["LLaMA-2-70B"] == 68_976_648_192


def test_a_fit_says_how_far_to_trust_it(tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "laws.png"
    three = shear("fit", PUBLISHED, "--at", "1345423360", "--extrapolate", "--picture", picture)
    assert three.exit_code == 0, three.output
    for said in (
        "no error estimate",
        "extrapolated: 5.0 times",
        "cc: c is at its bound; unbounded c = -2.80",
        "1.9881",
    ):
        assert said in three.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "c = -2.80 is no entropy" in shear("fit", PUBLISHED, "--at", "10B", "--unbounded").stdout

    table = tmp_path / "family.csv"
    table.write_text("model,parameters,books\nA,100M,3.0\nB,300M,2.7\nC,1B,2.4\nD,3B,2.3\n")
    four = shear("fit", table, "--at", "500M")
    assert four.exit_code == 0, four.output
    assert "left out" in four.stdout
    assert "extrapolated" not in four.stdout
    chosen = shear("fit", table, "--at", "500M", "--model", "A", "--model", "B", "--model", "D")
    assert "no error estimate" in chosen.stdout


def test_a_fit_says_what_its_losses_were_measured_under(tmp_path: Path) -> None:
    table, output = tmp_path / "table.json", tmp_path / "reference.json"
    conditions = Conditions(
        corpus_fingerprint="c", tokenizer_fingerprint="t", sequence_length=8, tokens_per_domain=64, precision="float32"
    )
    rows = [(1000, 3.0), (10_000, 2.7), (100_000, 2.4)]
    LossTable(
        origin="here",
        conditions=conditions,
        rows=tuple(
            LossRow(model=str(size), parameters=size, losses={"letters": loss, "digits": loss}) for size, loss in rows
        ),
    ).write(table)
    assert shear("fit", table, "--at", "5K", "-o", output).exit_code == 0
    reference = MixtureRecipe(reference=output)
    with pytest.raises(ShearingError, match="measured with sequence_length 8"):
        resolve_reference(reference, domains=["letters"], measure_source=dict, conditions={"sequence_length": 16})
    resolve_reference(reference, domains=["letters"], measure_source=dict, conditions={"loss_across_documents": False})


def test_the_target_of_a_recipe_is_a_size(tiny_recipe: Path, tmp_path: Path) -> None:
    table = tmp_path / "family.csv"
    table.write_text("model,parameters,letters,digits\nA,1K,3.0,3.1\nB,10K,2.7,2.8\nC,100K,2.4,2.6\n")
    result = shear("fit", table, "--recipe", tiny_recipe)
    assert result.exit_code == 0, result.output
    d, m, layers, heads, vocabulary = 16, 24, 2, 2, 20
    size = layers * (2 * d + 4 * d * heads * 8 + 3 * d * m) + d + vocabulary * d
    assert f"{size:,}" in result.stdout
    budget = yaml.safe_load(tiny_recipe.read_text()) | {"target": {"parameters": "7K", "uniform": True}}
    budget["prune"]["estimator"] = "hard_concrete"
    tiny_recipe.write_text(yaml.safe_dump(budget))
    assert "7,000" in shear("fit", table, "--recipe", tiny_recipe).stdout


def test_tables_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    table = tmp_path / "table.json"

    def said(content: object) -> str:
        table.write_text(content if isinstance(content, str) else json.dumps(content))
        return error_of("fit", table, "--at", "1B")

    row = {"model": "A", "parameters": 1, "losses": {"books": 2.0}}
    assert "absent.json" in error_of("fit", tmp_path / "absent.json", "--at", "1B")
    assert "a loss table" in said("[")
    assert "a loss table" in said([1])
    assert "a loss table" in said({"rows": [{"model": "A"}]})
    assert "no number of parameters" in said({"rows": [{**row, "parameters": "many"}]})
    assert "above 0" in said({"rows": [{**row, "losses": {"books": -1}}]})
    assert "two rows of A" in said({"rows": [row, row]})
    assert "differ in code" in said({"rows": [row, {**row, "model": "B", "losses": {"books": 1, "code": 1}}]})
    assert "at least 3" in said({"rows": [row]})
    assert "at least 3" in said({"rows": []})
    for arguments, expected in (
        ([], "one of the two"),
        (["--at", "big"], "no number of parameters"),
        (["--at", "0"], "at least 1"),
        (["--at", "10B", "--picture", "laws.txt"], "ends in .png"),
        (["--at", "10B", "--model", "LLaMA-2-7b"], "did you mean LLaMA-2-7B?"),
    ):
        assert expected in error_of("fit", PUBLISHED, *arguments)


def test_extrapolation_is_a_factor_on_either_side() -> None:
    table = LossTable.read(PUBLISHED)
    assert fit_reference(table, parameters=10**10).factor == 1.0
    assert fit_reference(table, parameters=10 * table.rows[-1].parameters, extrapolate=True).factor == 10.0
    with pytest.raises(ShearingError, match=r"10\.0 times outside"):
        fit_reference(table, parameters=10 * table.rows[-1].parameters)
