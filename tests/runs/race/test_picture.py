"""The picture of a race has every contender that ran, and those far behind as figures."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from shearing.files.durable import read_json
from shearing.runs.race.results.picture import draw_race
from tests.repository import ROOT


def row(title: str, mean: float, *, seeds: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "method": "activations",
        "title": title,
        "seeds": list(range(seeds)),
        "mean": mean,
        "standard_deviation": 0.1 if seeds > 1 else None,
        **more,
    }


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"budgets": [{"tokens": 1024, "equal_tokens": {"rows": list(rows)}}], "own_forms": []}


def test_who_ran_is_named_and_who_is_far_behind_has_a_figure(tmp_path: Path) -> None:
    path = tmp_path / "results.svg"
    ran = [row("near", 4.0, outside_mean=4.5), row("far", 9.25), row("alone", 4.25, seeds=1)]
    assert draw_race(results(*ran, row("none", 0, seeds=0)), path=path)
    said = path.read_text()
    assert all(f">{title}<" in said for title in ("near", "far", "alone", "9.25"))
    assert ">none<" not in said
    first = path.read_bytes()
    draw_race(results(*ran), path=path)
    assert path.read_bytes() == first


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert not draw_race(results(row("none", 0, seeds=0)), path=tmp_path / "results.svg")
    assert not list(tmp_path.iterdir())


def test_the_picture_of_the_documents_is_of_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--output", str(tmp_path)])
    runpy.run_path(str(ROOT / "benchmarks/pictures.py"), run_name="__main__")
    drawn, kept = ((folder / "race-135m.svg").read_text() for folder in (tmp_path, ROOT / "docs"))
    for file in (ROOT / "benchmarks/records/race-135m/rows").glob("*seed0-30steps.json"):
        title = read_json(file)["title"].removesuffix(", refitted")
        assert f">{title}<" in drawn
        assert f">{title}<" in kept
