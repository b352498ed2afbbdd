from __future__ import annotations

import errno
import logging
import os
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from shearing.errors import ShearingError
from shearing.training.checkpoints.checkpoints import Checkpoints
from shearing.training.checkpoints.state import random_states, read_state, set_random_states, write_state


def _write(value: int) -> Any:
    def write(folder: Path) -> dict[str, int]:
        write_state(folder, "state", {"value": value, "tensor": torch.full((3,), float(value))})
        (folder / "engine").mkdir()
        (folder / "engine" / "weights").write_bytes(bytes([value % 256]) * 1000)
        return {"weight/x": value}

    return write


def _value(folder: Path | None) -> int:
    assert folder is not None
    return int(read_state(folder, "state")["value"])


def test_newest_is_the_last_saved_and_old_ones_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.newest() is None
    for step in (1, 2, 12):
        checkpoints.save(step=step, write=_write(step))
    assert _value(checkpoints.newest()) == 12
    assert (tmp_path / "latest").read_text().strip() == "step-00000012"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000012"]


def test_what_another_process_still_writes_is_not_ours_to_list(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    half_written: list[Path] = []

    def write(folder: Path) -> dict[str, int]:
        half_written.append(folder / ".shard-00001-of-00002.safetensors.writing")
        half_written[0].write_bytes(b"half")
        return _write(1)(folder)

    place = checkpoints.save(step=1, write=write)
    (place / half_written[0].name).unlink()  # as the other process renames it
    assert _value(checkpoints.newest()) == 1


def test_what_is_written_in_the_background_is_there_once_it_is_finished(tmp_path: Path) -> None:
    checkpoints, go_on = Checkpoints(tmp_path, keep_last=1), threading.Event()
    checkpoints.save(step=1, write=_write(1))

    def write(folder: Path) -> dict[str, int]:
        assert go_on.wait(60)
        return _write(2)(folder)

    checkpoints.begin(step=2, write=write, background=True)
    assert not checkpoints.is_written
    assert (tmp_path / "latest").read_text().strip() == "step-00000001"
    go_on.set()
    assert _value(checkpoints.finish()) == 2
    assert _value(checkpoints.newest()) == 2
    assert not list(tmp_path.glob(".writing-*"))


def test_what_fails_in_the_background_is_said_when_it_is_finished(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(step=1, write=_write(1))

    def write(folder: Path) -> dict[str, int]:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints.begin(step=2, write=write, background=True)
    with pytest.raises(ShearingError, match="free space"):
        checkpoints.finish()
    assert _value(checkpoints.newest()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_multiples_of_keep_every_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_every=4)
    for step in (2, 4, 6, 8, 10):
        checkpoints.save(step=step, write=_write(step))
    kept = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert kept == ["step-00000004", "step-00000008", "step-00000010"]


def test_what_will_not_fit_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(step=1, write=_write(1))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(ShearingError, match="free space"):
        checkpoints.save(step=2, write=lambda _: pytest.fail("written to a full disk"))
    assert _value(checkpoints.newest()) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_falls_back_with_a_warning(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(step=1, write=_write(1))
    newest = checkpoints.save(step=2, write=_write(2))
    victim = newest / "engine" / "weights"
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[500] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        os.truncate(victim, 10)
    elif damage == "remove":
        victim.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert _value(checkpoints.newest()) == 1
    assert "step-00000002 is damaged" in caplog.text
    assert "going back to the one before it" in caplog.text
    checkpoints.save(step=2, write=_write(22))
    assert _value(checkpoints.newest()) == 22


def test_that_no_checkpoint_is_left_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2):
        (checkpoints.save(step=step, write=_write(step)) / "manifest.json").unlink()
    assert checkpoints.newest() is None
    said = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert said[0] == "going back to the one before it"
    assert said[1] == "no undamaged checkpoint is left, so the stage starts again from its first step"


@pytest.mark.parametrize("keep_last", [1, 2])
def test_damaged_ones_of_later_steps_take_no_place(tmp_path: Path, keep_last: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=keep_last, keep_every=50)
    for step in (50, 90, 100):
        checkpoints.save(step=step, write=_write(step))
    for folder in tmp_path.glob("step-*"):
        if folder.name != "step-00000050":
            os.truncate(folder / "engine" / "weights", 10)
    for step in (60, 70, 80):
        place = checkpoints.save(step=step, write=_write(step))
        assert checkpoints.newest() == place
        assert (tmp_path / "latest").read_text().strip() == place.name
    there = sorted(int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*"))
    assert [step for step in there if step <= 80] == ([50, 80] if keep_last == 1 else [50, 70, 80])


@pytest.mark.parametrize("keep_every", [None, 27])
def test_a_damaged_one_that_is_not_written_again_goes_before_a_good_one(tmp_path: Path, keep_every: int | None) -> None:
    first = Checkpoints(tmp_path, keep_last=3)
    for step in (10, 20, 27):
        first.save(step=step, write=_write(step))
    (tmp_path / "step-00000027" / "engine" / "weights").write_bytes(b"half")
    again = Checkpoints(tmp_path, keep_last=2, keep_every=keep_every)
    assert _value(again.newest()) == 20
    again.begin(step=30, write=_write(30), background=False)
    assert (tmp_path / "step-00000027").is_dir(), "nothing goes before the new one is whole"
    again.finish()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000020", "step-00000030"]


def test_copies_beside_checkpoints_are_none(tmp_path: Path) -> None:
    Checkpoints(tmp_path, keep_last=1).save(step=1, write=_write(1))
    (tmp_path / "step-00000002-copy").mkdir()
    assert _value(Checkpoints(tmp_path, keep_last=1).newest()) == 1


def test_leftovers_of_interrupted_writes_are_removed(tmp_path: Path) -> None:
    Checkpoints(tmp_path, keep_last=1).save(step=1, write=_write(1))
    for name in (".writing-step-00000002", ".removing-step-00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    (tmp_path / ".latest.abc").write_text("x")
    assert _value(Checkpoints(tmp_path, keep_last=1).newest()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_keeps_what_was_there(tmp_path: Path, error: Exception) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(step=1, write=_write(1))

    def write(folder: Path) -> None:
        (folder / "part").write_text("x")
        raise error

    with pytest.raises(ShearingError, match="free space"):
        checkpoints.save(step=2, write=write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert _value(checkpoints.newest()) == 1


def test_states_come_back_exactly(tmp_path: Path) -> None:
    flat = torch.randn(6)
    state = {
        "none": None,
        "float": 0.1 + 0.2,
        "flags": [True, 3, "x"],
        "tuple": (1, (2.5,)),
        "optimizer": {0: {"exp_avg": flat[:3], "step": torch.tensor(4.0)}, 1: {}},
        "empty": [],
        "bytes": torch.arange(5, dtype=torch.uint8),
        "integers": torch.tensor([2**62]),
    }
    write_state(tmp_path, "state", state)
    loaded = read_state(tmp_path, "state")
    assert str(loaded) == str(state)
    assert torch.equal(loaded["optimizer"][0]["exp_avg"], flat[:3])
    with pytest.raises(TypeError, match="/thing"):
        write_state(tmp_path, "state", {"thing": object()})


def test_random_states_round_trip(tmp_path: Path) -> None:
    write_state(tmp_path, "random", random_states())
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    set_random_states(read_state(tmp_path, "random"))
    assert [random.random(), float(np.random.rand()), float(torch.rand(()))] == drawn


def test_the_generator_of_a_gpu_goes_along_with_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processes of one host are four of each of two when they continue: the sixth has another number there."""
    on_gpus = [torch.full((4,), index, dtype=torch.uint8) for index in range(6)]
    here = 5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: here)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device=None: on_gpus[here if device is None else device])
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: on_gpus)
    monkeypatch.setattr(
        torch.cuda,
        "set_rng_state",
        lambda state, device=None: on_gpus.__setitem__(here if device is None else device, state),
    )
    saved = random_states()
    here = 1
    set_random_states(saved)
    assert [int(state[0]) for state in on_gpus] == [0, 5, 2, 3, 4, 5]

    of_an_older_release = {**saved, "cuda": [torch.full((4,), 10 + index, dtype=torch.uint8) for index in range(6)]}
    set_random_states(of_an_older_release)
    assert [int(state[0]) for state in on_gpus] == [0, 11, 2, 3, 4, 5]
    for none in (None, []):  # saved where there was no GPU
        set_random_states({**saved, "cuda": none})
    assert [int(state[0]) for state in on_gpus] == [0, 11, 2, 3, 4, 5]
