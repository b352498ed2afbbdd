"""Pictures in one style, whose files can be compared."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from shearing.files.pictures import INK, quiet_axes, save_picture


def _draw(path: Path) -> bytes:
    with matplotlib.rc_context({**quiet_axes(), "svg.hashsalt": "test"}):  # type: ignore[arg-type]
        figure = Figure(figsize=(2, 1))
        figure.subplots().plot([1, 2], [3, 4])
        save_picture(figure, path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".SVG"])
def test_the_same_picture_is_the_same_file(suffix: str, tmp_path: Path) -> None:
    first = _draw(tmp_path / f"a{suffix}")
    assert first == _draw(tmp_path / f"b{suffix}")
    assert b"<dc:date>" not in first


def test_colours_can_be_others() -> None:
    ours, others = quiet_axes(), quiet_axes(ink="#010203")
    assert (ours.pop("text.color"), others.pop("text.color")) == (INK, "#010203")
    assert ours == others
    assert ours.keys() <= set(matplotlib.rcParams)
