"""Series from metrics.jsonl: one tokens axis, damaged lines, downsampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shearing.runs.report.series import downsample, keys_of, nested, read_stages, series_of, smooth


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_the_second_stage_goes_on_where_the_first_one_ended(tmp_path: Path) -> None:
    first = write(tmp_path / "a", *({"step": step, "tokens": 10 * step, "loss": 5.0} for step in (1, 2, 3)))
    second = write(tmp_path / "b", *({"step": step, "tokens": 20 * step, "loss": 4.0} for step in (1, 2)))

    x, y = series_of(read_stages({"a": first, "b": second}), read=lambda line: line["loss"])

    assert x == [10, 20, 30, 50, 70]
    assert y == [5, 5, 5, 4, 4]


def test_mixture_updates_lie_at_the_tokens_of_their_step(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a",
        {"step": 1, "tokens": 100},
        {"step": 2, "tokens": 200},
        {"step": 2, "event": "mixture", "losses": {"books": 3.5}},
        {"step": 3, "tokens": 300},
    )
    stages = read_stages({"a": path})

    assert series_of(stages, read=nested("losses", "books"), updates=True) == ([200.0], [3.5])
    assert keys_of(stages, "losses", updates=True) == ["books"]


def test_absent_files_cut_off_lines_and_null_values_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"step": 1, "tokens": 1, "loss": None}, "[1]\n", '{"step": 2, "tok')
    stages = read_stages({"a": path, "b": tmp_path / "none"})

    assert series_of(stages, read=lambda line: line["loss"]) == ([], [])
    assert [len(stage.steps) for stage in stages] == [1, 0]


@pytest.mark.parametrize("length", [0, 1, 299, 300, 301, 12_345])
def test_downsampling_keeps_the_mean_and_the_limit(length: int) -> None:
    x = [float(index) for index in range(length)]
    short_x, short_y = downsample(x, x, points=300)

    assert len(short_x) == len(short_y) == min(length, 300)
    assert short_x == sorted(short_x)
    if length:
        assert sum(short_y) / len(short_y) == pytest.approx(sum(x) / length, rel=0.01)


def test_smoothing_keeps_constants_and_length() -> None:
    assert smooth([2.0] * 7, window=4) == [2.0] * 7
    assert smooth([1.0, 2.0], window=1) == [1.0, 2.0]
