from __future__ import annotations

import io

import pytest
from rich.console import Console

from shearing import progress


def test_activity_reports_share_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    output = io.StringIO()
    with progress.activity("held-out losses", total=200, console=Console(file=output)) as advance:
        advance(50)
    assert output.getvalue().startswith("held-out losses (25%) · 0:00 left")
