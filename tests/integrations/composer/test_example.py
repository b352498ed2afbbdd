"""The example of Composer as people run it, on a tiny model; `make test-composer` runs this."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.repository import ROOT
from tests.training import tasks

pytest.importorskip("composer", reason="make test-composer")

EXAMPLE = ROOT / "examples" / "prune_with_composer.py"


def test_the_example_prunes_and_cuts(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("prune_with_composer", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = module.TargetRecipe
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    monkeypatch.setattr(module, "TargetRecipe", lambda **_: recipe(**small))
    monkeypatch.setattr(module, "SEQUENCE_LENGTH", tasks.LENGTH)
    monkeypatch.setattr(module, "HELD_OUT_TOKENS", 64)
    arguments = ["--model", tiny_inputs / "model", "--corpus", tiny_inputs / "corpus", "--output", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
    module.main()
    assert "domain weights: digits" in capsys.readouterr().out
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "model").config
    assert (config.num_hidden_layers, config.hidden_size) == (2, 16)
    assert "rope_theta" in json.loads((tmp_path / "model" / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "model").encode("ab01")
    assert list((tmp_path / "checkpoints").glob("*.pt"))
