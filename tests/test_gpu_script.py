"""`benchmarks/gpu.sh` says so where there is no GPU, and its dry run walks through all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.repository import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    done = run()
    assert done.returncode == 0
    [line] = done.stdout.splitlines()
    assert line.startswith("no NVIDIA GPU here")


@pytest.mark.slow
def test_a_dry_run_walks_through_everything() -> None:
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    result = json.loads(last)
    found = result["parts"]
    assert list(found) == [
        "agreement",
        "one-process",
        "tiny-dense",
        "tiny-masked",
        "tiny-distilled",
        "semi-structured",
    ]
    assert not any("failed" in part or "left_out" in part for part in found.values())
    for kind in ("dense", "masked", "distilled"):
        # The same device twice in fp32; in bf16 it is not the same arithmetic.
        assert found["agreement"][f"{kind}, fp32"] == 0
        assert 0 < found["agreement"][f"{kind}, bf16"] < 0.02
        step = found[f"tiny-{kind}"]
        assert step["tokens_per_second"] == pytest.approx(2 * 2 * 32 / step["seconds"])
        assert step["planned_memory"] > 0
        assert f"| tiny-{kind} | " in done.stdout
    assert 0 < found["one-process"]["loss"] < 10
    assert found["semi-structured"]["supported"] is torch.cuda.is_available()
