"""Files that are there whole or not at all, and what a killed process leaves beside them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shearing.errors import ShearingError
from shearing.files.durable import locked, read_json, write_json
from tests.forks import PROCESSES


def _killed_while_writing(path: Path) -> None:
    """Writes a JSON file, and is killed right before it would have its name."""
    Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign]
    write_json(path, {"a": 1})


def test_what_a_killed_process_had_begun_to_write_goes_with_the_next_that_works_there(tmp_path: Path) -> None:
    path = tmp_path / "run" / "prune" / "summary.json"
    write_json(path, {"a": 0})
    (path.parent / ".hidden").write_text("somebody else's")
    process = PROCESSES.Process(target=_killed_while_writing, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(path.parent.glob(".summary.json.*"))) == 1
    assert read_json(path) == {"a": 0}
    with locked(tmp_path / "run", field="run_dir"):
        assert sorted(each.name for each in path.parent.iterdir()) == [".hidden", "summary.json"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ShearingError, match="a folder that can be made") as caught, locked(folder, field="output"):
            pass
        assert caught.value.field == "output"
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("payload", [{"a": float("nan")}, {"a": float("inf")}])
def test_what_is_no_json_leaves_nothing(payload: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", payload)
    assert not list(tmp_path.iterdir())
