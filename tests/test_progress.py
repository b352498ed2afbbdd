from __future__ import annotations

import io
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


def test_a_peak_of_memory_is_since_it_was_begun_anew() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("resident memory has one peak here")
    before = progress.max_memory()
    large = b"x" * 200_000_000
    assert progress.max_memory() >= before
    high = progress.max_memory()
    del large
    progress.reset_max_memory()
    assert progress.max_memory() < high
