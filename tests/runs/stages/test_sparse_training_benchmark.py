"""The benchmark of training under masks: rows are kept, what is interrupted goes on, and the line of JSON is whole."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.repository import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("sparse_training_benchmark", ROOT / "benchmarks/sparse_training.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FULL", module.Sizes(seqlen=16, batch=2, samples=4, heldout=32))
    return module


def test_rows_are_kept_and_methods_are_compared(
    script: ModuleType, tiny_inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--model", str(tiny_inputs / "model"), "--corpus", str(tiny_inputs / "corpus")]
    places += ["--outside", str(tmp_path / "absent"), "--output", str(tmp_path / "rows")]
    sizes = ["--methods", "masked", "ast + teacher", "--budgets", "4", "--seeds", "1", "--rates", "1"]
    with pytest.raises(SystemExit, match="out of time: the same command goes on"):
        script.main([*places, *sizes, "--minutes", "0"])
    script.main([*places, *sizes])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == "sparse_training"
    equal_tokens, equal_flops = result["rows"].values()
    assert [line["steps"] for line in equal_tokens.values()] == [0, 4, 4]
    # The norms of 16 sequences, 2 in a step, are a third of 8 steps: 1.33 of 4 are left, which cost 4 / 3 each.
    assert [line["steps"] for line in equal_flops.values()] == [0, 4, 1]
    assert equal_tokens["masked"]["trained"] == result["parameters"]
    assert result["over_masked"]["4 steps, equal tokens"]["ast + teacher"]["seeds"] == [0]
    names = sorted(path.stem for path in (tmp_path / "rows" / "rows").iterdir())
    assert names == ["ast+teacher-1-0.0003-0", "ast+teacher-4-0.0003-0", "masked-4-0.0003-0", "one-shot-0-0-0"]
    # All rows are there: nothing is trained any more.
    script.main([*places, *sizes, "--minutes", "0"])
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["rows"] == result["rows"]
    with pytest.raises(SystemExit, match="choose another --output"):
        script.main([*places, *sizes, "--criterion", "magnitude"])
