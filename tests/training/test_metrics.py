from __future__ import annotations

import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shearing import progress
from shearing.progress import activity
from shearing.training import metrics
from shearing.training.metrics import Display, MetricsLog, StageTotals, print_summary


def _record(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 100,
        "loss": 3.25,
        "grad_norm": 0.5,
        "learning_rate": 1e-4,
        "tokens_per_second": 143.0,
        "mfu": 0.415,
        "data_wait": 0.0,
        "seconds": 0.7,
        "skipped": 1,
        "weights": {"web": 0.75, "code": 0.25},
        "expected": {"hidden": 500.25},
        "target": {"hidden": 480.0},
        "violation": {"hidden": 0.035},
        "lambda_1": {"hidden": 0.1},
        "lambda_2": {"hidden": 0.2},
        "max_memory": 1,
    }


def test_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "metrics.jsonl"
    log = MetricsLog(path, num_bytes=0)
    log.write({"step": 1})
    size = log.sync()
    log.write({"step": 2})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 3, "los')
    log = MetricsLog(path, num_bytes=size)
    log.write({"step": 2, "loss": math.nan, "losses": {"web": math.inf}})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2, "loss": None, "losses": {"web": None}},
    ]


def test_log_that_lost_lines_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        MetricsLog(tmp_path / "metrics.jsonl", num_bytes=10).close()
    assert "lines are missing" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_plain_lines_tell_percent_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PLAIN_SECONDS", 0.0)
    output = io.StringIO()
    with Display("prune", total_steps=4, done_steps=1, console=Console(file=output)) as display:
        display.show(_record(2))
        display.show({"event": "mixture", "losses": {"web": 3.0}, "reference": {}})
        display.show(_record(4))
    first, last = output.getvalue().splitlines()
    assert first.startswith("prune 2/4 (50%)")
    assert "left" in first
    assert "loss 3.25" in first
    assert "143 tok/s, MFU 41.5%" in first
    assert "skipped 1" in first
    assert "hidden 500.2/480" in first
    assert "web 0.750" in first
    assert last.startswith("prune 4/4 (100%)")


def test_live_view_shows_everything() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, color_system=None, width=120)
    with Display("prune", total_steps=4, done_steps=0, console=console) as display:
        display.show(_record(1))
        display.show({"event": "mixture", "losses": {"web": 2.875}, "reference": {"web": 2.5}})
        with display.activity("held-out losses", total=100) as advance:
            advance(50)
            console.print(display._panel())
    text = output.getvalue()
    figures = ("25%", "1/4", "left", "3.25", "143 tokens/s", "MFU 41.5%", "500.2", "480", "0.035", "0.750", "2.875")
    for part in (*figures, "held-out"):
        assert part in text


def test_activity_reports_share_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    output = io.StringIO()
    with activity("held-out losses", total=200, console=Console(file=output)) as advance:
        advance(50)
    assert output.getvalue().startswith("held-out losses (25%) · 0:00 left")


def test_summary_tells_what_time_went_into() -> None:
    totals = StageTotals(heldout_seconds=0.7)
    for step in range(1, 21):
        totals.add(_record(step) | {"loss": float(step)}, tokens=100)
    output = io.StringIO()
    print_summary("prune", totals, console=Console(file=output, width=120), rows={"hidden, kept of 576": "480"})
    text = output.getvalue()
    assert "1.500 → 19.500" in text
    assert "2,000 at 143 tokens/s" in text
    assert "4.8 %" in text
    assert "41.5 %" in text
    assert "kept of 576" in text
