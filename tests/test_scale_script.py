"""`benchmarks/scale.py` walks through a whole run on two processes, and says of each step what they hold."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.repository import ROOT


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory of other processes is read from /proc")
def test_no_process_holds_much_more_than_its_share() -> None:
    script = ROOT / "benchmarks" / "scale.py"
    command = [sys.executable, str(script), "--quick", "--models", "8M", "--engines", "fsdp2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    (row,) = result["runs"]
    assert list(row["steps"])[:3] == ["load", "reference losses", "rank"]
    assert {"refit", "share out", "train", "save", "end of mask learning", "cut", "evaluate"} <= row["steps"].keys()
    assert all(len(peaks) == 2 for peaks in row["steps"].values())
    # Weights and moments are 0.75 of a share; a small model's layer is a larger part of it than a large one's.
    assert 0.7 < max(row["steps"]["share out"]) < 1.2
    for step in ("load", "rank", "refit", "end of mask learning", "cut", "load what was cut", "write the result"):
        assert max(row["steps"][step]) < 1.0, step
    assert result["worst_peak_over_share"] == row["worst_peak_over_share"] > 0.7
    assert result["rank0_over_others"] == row["rank0_over_others"] > 0
