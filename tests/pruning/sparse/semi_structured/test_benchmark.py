"""The benchmark runs to its line of JSON, with hardware and without."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.pruning.sparse.semi_structured.pretended import Converted, pretended
from tests.repository import ROOT

SCRIPT = ROOT / "benchmarks" / "semi_structured.py"


@pytest.fixture
def benchmark_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("semi_structured_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def result_of(
    script: ModuleType, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["semi_structured.py", "--quick", *arguments])
    script.main()
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_without_hardware(
    benchmark_script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = result_of(benchmark_script, monkeypatch=monkeypatch, capsys=capsys)
    assert (result["benchmark"], result["supported"]) == ("semi_structured", False)
    assert result["reason"] == "no GPU that torch can use"


def test_with_hardware(
    benchmark_script: ModuleType,
    tiny_inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where a converted call costs half, but one token costs more: layers gain, and decoding chooses none."""

    def cost(weight: torch.Tensor, tokens: int) -> float:
        return tokens / 2 + 1 if isinstance(weight, Converted) else float(tokens)

    monkeypatch.setattr(benchmark_script, "find_hardware", lambda: pretended(cost))
    workloads = (benchmark_script.Workload("prefill", 1, 64), benchmark_script.Workload("decode", 1, 2))
    monkeypatch.setattr(benchmark_script, "QUICK", benchmark_script.Sizes((1, 32), workloads, 1, 1))
    arguments = ("--model", str(tiny_inputs / "model"))
    result = result_of(benchmark_script, *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert result["supported"] is True
    aligned = [of for of in result["per_layer"] if of["ratios"]]
    assert aligned
    for of in aligned:
        assert of["ratios"]["cusparselt"] == pytest.approx({"1": 1 / 1.5, "32": 32 / 17})
    prefill, decode = result["end_to_end"]
    assert (prefill["tokens_at_a_time"], decode["tokens_at_a_time"]) == (64, 1)
    assert prefill["faster_layers"] == prefill["all_layers"] == sum(of["layers"] for of in aligned)
    assert prefill["all_ratio"] == prefill["faster_ratio"] > 1.5
    assert decode["all_ratio"] < 0.8
    assert (decode["faster_layers"], decode["faster_ratio"]) == (0, None)


def test_a_random_model(benchmark_script: ModuleType) -> None:
    model = benchmark_script.random_model("64/96/4/2", layers=2, dtype=torch.bfloat16, device=torch.device("cpu"))
    layers = benchmark_script.linear_layers(model)
    assert [name.rpartition(".")[2] for name, _ in layers[:2]] == ["q_proj", "k_proj"]
    assert {int(of.weight.count_nonzero()) * 2 for _, of in layers} == {of.weight.numel() for _, of in layers}
    assert len(layers) == 14
