"""Levels from the command: alone in a file, used by a later run, inside a run; killed, continued, refused."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from shearing.cli.frame import app
from shearing.pruning.sparse.stored.check import differences
from shearing.pruning.sparse.stored.manifest import read_manifest
from tests.forks import start_shear

SEARCH = ("search.population=4", "search.offspring=4", "search.generations=2", "search.fitness_samples=4")
TEXT = ("--samples", "6", "--seqlen", "16")
SECONDS = 120.0


def shear(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def run(*arguments: str | Path) -> str:
    result = shear(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def error_of(*arguments: str | Path) -> str:
    result = shear(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


def msp(inputs: Path, output: Path) -> list[str | Path]:
    options = ["--criterion", "wanda", "--allocation", "msp", "--target", "0.5", "--levels", "1:4,2:4,3:4,4:4"]
    return ["allocate", inputs / "model", *options, "--calibration", inputs / "corpus", *TEXT, *SEARCH, "-o", output]


@pytest.fixture(scope="module")
def allocation(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that must not be changed."""
    path = tmp_path_factory.mktemp("allocation") / "allocation.json"
    said = run(*msp(tiny_inputs, path))
    assert "best" in said
    assert "uniform" in said
    return path


def test_a_full_disk_is_said_of_the_output(tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shearing.files.tensors.save_file", full)
    message = error_of(*msp(tiny_inputs, tmp_path / "allocation.json"))
    assert f"output = '{tmp_path}, with " in message
    assert "a disk with room for what is found of each layer, until levels are chosen" in message


def test_the_file_says_what_was_found_and_why(allocation: Path) -> None:
    content = json.loads(allocation.read_text())
    assert content["allocation"] == "msp"
    assert content["budget"]["reached"] == {"kept": "1/2", "sparsity": 0.5}
    assert len(content["patterns"]) == 28
    facts = content["facts"]
    assert facts["scores"].keys() == {f"layer {layer}" for layer in range(4)}
    assert facts["fitness"].keys() == {"msp", "uniform", "depth", "alpha", "owl", "rank", "redundancy"}
    assert facts["fitness"]["msp"] == min(facts["fitness"].values())
    best = [each["best"] for each in facts["history"]]
    assert [each["generation"] for each in facts["history"]] == [0, 1, 2]
    assert best == sorted(best, reverse=True)
    assert facts["forward_passes"] > 0
    assert allocation.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not allocation.with_name("allocation.json.partial").exists()


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_a_later_run_uses_the_file(criterion: str, allocation: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    options = ["--criterion", criterion, "--allocation", allocation, "--calibration", tiny_inputs / "corpus", *TEXT]
    run("sparsify", tiny_inputs / "model", *options, "-o", tmp_path / "sparse")
    manifest, content = read_manifest(tmp_path / "sparse"), json.loads(allocation.read_text())
    assert {name: about["pattern"] for name, about in manifest["matrices"].items()} == content["patterns"]
    assert manifest["allocation"] == "msp"
    assert manifest["budget"]["reached"]["sparsity"] == 0.5
    assert differences(tmp_path / "sparse") == []
    assert json.loads((tmp_path / "sparse" / "allocation.json").read_text())["patterns"] == content["patterns"]


def test_alone_and_inside_a_run_are_the_same(allocation: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    arguments = msp(tiny_inputs, tmp_path / "sparse")
    run("sparsify", *arguments[1:])
    content = json.loads((tmp_path / "sparse" / "allocation.json").read_text())
    assert content["patterns"] == json.loads(allocation.read_text())["patterns"]
    assert not (tmp_path / "sparse.partial").exists()


@pytest.mark.parametrize("rule", ["depth", "alpha", "owl", "rank"])
@pytest.mark.parametrize("unit", ["block", "matrix"])
def test_rules_meet_the_budget(rule: str, unit: str, tiny_inputs: Path, tmp_path: Path) -> None:
    options = ["--criterion", "wanda", "--allocation", rule, "--pattern", "4:8", "--unit", unit]
    text = ["--calibration", tiny_inputs / "corpus", *TEXT]
    run("allocate", tiny_inputs / "model", *options, *text, "spread=0.4", "-o", tmp_path / "found.json")
    content = json.loads((tmp_path / "found.json").read_text())
    assert Fraction(content["budget"]["reached"]["kept"]) == Fraction(1, 2)
    assert len(set(content["patterns"].values())) > 1
    assert (tmp_path / "found.png").stat().st_size > 10_000


def test_a_budget_that_cannot_be_reached_exactly_is_said(tiny_inputs: Path, tmp_path: Path) -> None:
    options = ["--criterion", "magnitude", "--allocation", "depth", "--target", "0.51", "--levels", "1:4,2:4,3:4"]
    said = run("allocate", tiny_inputs / "model", *options, "-o", tmp_path / "found.json")
    assert "levels cannot be mixed to 51 % exactly; the nearest is 50.0000 %" in said
    budget = json.loads((tmp_path / "found.json").read_text())["budget"]
    assert (budget["asked"]["sparsity"], budget["reached"]["sparsity"]) == (0.51, 0.5)


def test_unstructured_levels(tiny_inputs: Path, tmp_path: Path) -> None:
    options = ["--criterion", "wanda", "--allocation", "depth", "--sparsity", "0.5"]
    text = ["--calibration", tiny_inputs / "corpus", *TEXT]
    run("sparsify", tiny_inputs / "model", *options, *text, "-o", tmp_path / "sparse")
    manifest = read_manifest(tmp_path / "sparse")
    shares = [about["sparsity"] for about in manifest["layers"].values()]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
    assert abs(manifest["budget"]["reached"]["sparsity"] - 0.5) < 2e-3


def test_hardware_restricts_the_levels(tiny_inputs: Path, tmp_path: Path) -> None:
    options = ["--criterion", "magnitude", "--allocation", "depth", "--target", "0.8125", "--pattern", "2:8"]
    message = error_of("allocate", tiny_inputs / "model", *options, "-o", tmp_path / "found.json")
    assert "sparsity" in message
    options = ["--criterion", "magnitude", "--allocation", "depth", "--target", "0.8125", "--levels", "1:8,2:8,6:8"]
    run("allocate", tiny_inputs / "model", *options, "--hardware", "2:4", "spread=0.5", "-o", tmp_path / "found.json")
    found = set(json.loads((tmp_path / "found.json").read_text())["patterns"].values())
    assert found == {"1:8", "2:8"}


def test_hardware_restricts_uniform_levels_and_files_too(tiny_inputs: Path, tmp_path: Path) -> None:
    begin = ["sparsify", tiny_inputs / "model", "--criterion", "magnitude", "-o", tmp_path / "sparse"]
    for way in (["--pattern", "4:8"], ["--sparsity", "0.5"]):
        assert "hardware = '2:4'" in error_of(*begin, *way, "--hardware", "2:4")
    options = ["--criterion", "magnitude", "--allocation", "depth", "--target", "0.5", "--levels", "2:8,6:8"]
    run("allocate", tiny_inputs / "model", *options, "spread=0.5", "-o", tmp_path / "found.json")
    message = error_of(*begin, "--allocation", tmp_path / "found.json", "--hardware", "2:4")
    assert "which none of 6:8 is" in message
    assert not (tmp_path / "sparse").exists()
    run(*begin, "--pattern", "2:4", "--hardware", "2:4")


def test_killed_and_continued_finds_the_same(allocation: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    state = tmp_path / "found.json.partial" / "search.json"
    process = start_shear(msp(tiny_inputs, output), output=tmp_path / "said.txt")
    deadline = time.monotonic() + SECONDS
    while not state.exists() and process.exitcode is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.join(SECONDS)
    assert process.exitcode in (-signal.SIGKILL, 0)
    if not output.exists():
        run(*msp(tiny_inputs, output))
    found, expected = (json.loads(path.read_text()) for path in (output, allocation))
    assert found["patterns"] == expected["patterns"]
    assert found["facts"]["fitness"] == pytest.approx(expected["facts"]["fitness"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--target", "0.9", "--levels", "1:4,2:4"], ["sparsity = 0.9", "between 0.5 and 0.75", "1:4, 2:4"]),
        (["--target", "0.5", "--levels", "2:5,3:5"], ["2:5", "an M that divides the 32 inputs"]),
        (["--target", "0.5", "--levels", "2:4,4:8"], ["levels", "levels that keep different shares"]),
        (["--target", "0.5", "--levels", "5:4"], ["levels = '5:4'", "write 1:8,2:8,4:8"]),
        (["--target", "0.5", "--levels", "3:4", "--hardware", "2:4"], ["hardware", "which none of 3:4 is"]),
        ([], ["sparsity = None", "say how much goes"]),
        (["--pattern", "2:4", "--levels", "row 0.5"], ["levels = 'row 0.5'", "N:4 with pattern 2:4"]),
        (["--pattern", "4:8", "--levels", "1:4,2:4"], ["levels = '1:4, 2:4'", "N:8 with pattern 4:8"]),
        (["--target", "0.5", "--group", "layer", "--levels", "row 0.5"], ["group = 'layer'", "unset with levels"]),
    ],
)
def test_bad_input(arguments: list[str], parts: list[str], tiny_inputs: Path, tmp_path: Path) -> None:
    options = ["--criterion", "magnitude", "--allocation", "depth", *arguments]
    message = error_of("allocate", tiny_inputs / "model", *options, "-o", tmp_path / "found.json")
    for part in parts:
        assert part in message, message
    assert not (tmp_path / "found.json.partial" / "allocation.json").exists()


def test_what_a_file_says_is_not_said_otherwise(allocation: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    begin = ["sparsify", tiny_inputs / "model", "--criterion", "magnitude", "-o", tmp_path / "sparse", "--allocation"]
    assert "unset with an allocation file" in error_of(*begin, allocation, "--group", "row")
    message = error_of(*begin, allocation, "--pattern", "4:8")
    assert "pattern = '4:8'" in message
    assert "other kinds of levels: 1:4, " in message
    options = ["--criterion", "magnitude", "--allocation", "depth", "--target", "0.5"]
    run("allocate", tiny_inputs / "model", *options, "spread=0.2", "-o", tmp_path / "rows.json")
    assert "remove pattern" in error_of(*begin, tmp_path / "rows.json", "--pattern", "2:4")
    assert not (tmp_path / "sparse").exists()
    run(*begin, allocation, "--pattern", "2:4")


def test_a_file_of_something_else(allocation: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    options = ["--criterion", "magnitude", "-o", tmp_path / "sparse", "--allocation"]
    other = Path(shutil.copytree(tiny_inputs / "model", tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    run("sparsify", tiny_inputs / "model", *options, allocation)
    shutil.rmtree(tmp_path / "sparse")
    assert "an allocation of the model that is pruned" in error_of("sparsify", other, *options, allocation)
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    assert "an allocation.json that `shear allocate` has written" in error_of(
        "sparsify", tiny_inputs / "model", *options, wrong
    )
    assert "ends in .json" in error_of(*msp(tiny_inputs, allocation))
    message = error_of("sparsify", tiny_inputs / "model", *options, allocation, "--sparsity", "0.25")
    assert "0.500000 of the weights kept" in message
