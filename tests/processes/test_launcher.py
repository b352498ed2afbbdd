"""A launcher that is gone takes its processes along, whatever they do at that moment."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from shearing.processes.launcher import Ancestor, LauncherGuard, ancestors, is_left_behind
from tests.repository import ROOT

PYTHON = "/usr/bin/python3"
MARK = "TORCHELASTIC_RUN_ID"
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")


def _chain(*commands: str) -> list[Ancestor]:
    return [Ancestor(100 - number, "1", tuple(command.split())) for number, command in enumerate(commands)]


@pytest.mark.parametrize(
    ("command", "name", "is_launcher"),
    [
        (f"{PYTHON} /env/bin/torchrun --standalone -m shearing run", "torchrun", True),
        (f"{PYTHON} -u -m torch.distributed.run -m shearing run", "torch.distributed.run", True),
        (f"{PYTHON} /env/bin/accelerate launch -m shearing run", "accelerate", True),
        (f"{PYTHON} /env/bin/deepspeed --module shearing run", "deepspeed", True),
        (f"{PYTHON} -u -m deepspeed.launcher.launch --module shearing run", "deepspeed.launcher.launch", True),
        (f"{PYTHON} /env/bin/shear run --gpus 8", "shear", False),
        (f"{PYTHON} -c pass torchrun", "python3", False),
        (PYTHON, "python3", False),
        (f"{PYTHON} -m", "python3", False),
        ("bash torchrun.sh", "bash", False),
        ("/usr/sbin/sshd -D", "sshd", False),
        ("", "a process", False),
    ],
)
def test_launchers_are_known_by_what_they_were_started_with(command: str, name: str, is_launcher: bool) -> None:
    (found,) = _chain(command)
    assert (found.name, found.is_launcher) == (name, is_launcher)


@pytest.mark.parametrize("shell", ["bash", "-zsh", "/bin/sh"])
def test_shells_are_left(shell: str) -> None:
    assert _chain(shell)[0].is_shell


@pytest.mark.parametrize(
    ("above", "left_behind"),
    [
        ([f"{PYTHON} /env/bin/torchrun", "bash", "init"], False),
        (["bash wrapper.sh", f"{PYTHON} mine.py", "init"], False),
        ([f"{PYTHON} /env/bin/torchrun"], False),  # the first process of a container
        (["/sbin/init"], True),
        (["/usr/lib/systemd/systemd --user", "/sbin/init"], True),
        ([], False),  # nothing can be said
    ],
)
def test_who_comes_too_late_to_see_the_launcher_knows_that_there_was_one(
    above: list[str], left_behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(MARK, raising=False)
    assert not is_left_behind(_chain(*above), marks=[MARK])  # a daemon, started by hand
    monkeypatch.setenv(MARK, "none")
    assert is_left_behind(_chain(*above), marks=[MARK]) == left_behind


@needs_proc
def test_ancestors_are_those_of_this_process() -> None:
    found = ancestors()
    assert found[0].pid == os.getppid()
    assert [each.pid for each in found] == [each.pid for each in psutil.Process().parents()]
    assert not any(each.is_gone() for each in found)
    later = Ancestor(found[0].pid, "0", found[0].command)
    assert later.is_gone(), "a number that was given again is another process"


@needs_proc
def test_a_launcher_above_the_parent_is_missed_too() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as above:
        entry = _as_seen_from_below(above.pid)
        guard = LauncherGuard(parent=os.getppid(), launchers=[entry], ancestors=[])
        assert guard.gone() is None
        above.kill()
        deadline = time.monotonic() + 10
        while guard.gone() is None:  # gone, though nobody has asked for its exit code
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert guard.gone() == f"{entry.name} (process {above.pid})"


def _as_seen_from_below(pid: int) -> Ancestor:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Ancestor(pid, fields[19], (sys.executable, "-c", ""))


WAITING = """
    import os, sys, time
    from pathlib import Path
    from shearing.processes.launcher import launcher_guard

    launcher_guard()
    Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
    if os.environ["RANK"] == "2":
        time.sleep(600)  # has not come to the meeting yet
    from shearing.processes import Processes

    Processes.start(device="cpu", timeout=600)  # the first waits for all, the second to be connected
"""


@pytest.mark.slow
def test_a_launcher_killed_while_its_processes_meet_leaves_none(tmp_path: Path) -> None:
    program, pids, output = tmp_path / "waiting.py", tmp_path / "pids", tmp_path / "output.txt"
    program.write_text(textwrap.dedent(WAITING))
    pids.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (
        output.open("w") as file,
        subprocess.Popen(
            [*command, str(program), str(pids)], env=environment, stdout=file, stderr=file, start_new_session=True
        ) as launcher,
    ):
        try:
            deadline = time.monotonic() + 120
            while len(list(pids.iterdir())) < 3:
                assert time.monotonic() < deadline, output.read_text()
                time.sleep(0.1)
            time.sleep(5)  # into the rendezvous
            workers = psutil.Process(launcher.pid).children(recursive=True)
        finally:
            launcher.kill()
    _, left = psutil.wait_procs(workers, timeout=30)
    for each in left:
        each.kill()
    said = output.read_text()
    assert len(workers) == 3
    assert not left, said
    assert said.count(f"error: torch.distributed.run (process {launcher.pid}), which started process 0 of 3") == 1
    assert said.count("the same command continues") == 1
