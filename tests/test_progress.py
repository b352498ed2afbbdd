from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from shearing import progress


def test_activity_reports_share_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    output = io.StringIO()
    with progress.activity("held-out losses", total=200, console=Console(file=output)) as advance:
        advance(1)
        advance(49)
    # What is left is not guessed from less than a hundredth.
    first, second = output.getvalue().splitlines()
    assert first == "held-out losses (0%) · –:–– left"
    assert second.startswith("held-out losses (25%) · 0:00 left")


_PEAKS = """
from shearing.progress import max_memory, reset_max_memory
before = max_memory()
large = b"x" * 200_000_000
high = max_memory()
del large
reset_max_memory()
print(before, high, max_memory())
"""


def test_a_peak_of_memory_is_since_it_was_begun_anew() -> None:
    """In a process of its own, whose freed memory goes back to the system."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("resident memory has one peak here")
    done = subprocess.run([sys.executable, "-c", _PEAKS], capture_output=True, text=True, check=True)
    before, high, after = map(int, done.stdout.split())
    assert before + 150_000_000 < high
    assert after < high
