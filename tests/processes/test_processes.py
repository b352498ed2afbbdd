"""How processes start, agree and end together, whatever happens to one of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shearing.errors import ShearingError
from shearing.files.refusals import said_of_file
from shearing.processes.processes import AgreedEnd, Processes, Question
from shearing.processes.watch import exit_code
from tests.distributed.harness import Group, spawn, start

WRONG = ShearingError("prune.learning_rate", value=-1, allowed="above 0", mend="write 1e-4")


def _wait_for(path: Path, group: Group) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, group.said()
        time.sleep(0.02)


def _ends(program: Callable[..., None], *arguments: object, folder: Path, size: int = 2) -> tuple[list[int], list[str]]:
    """Exit codes and outputs by rank, of a program that does not hang."""
    group = start(program, *arguments, size=size, folder=folder)
    codes = group.wait(seconds=60)
    return [code if code is not None else -1 for code in codes], [path.read_text() for path in group.outputs]


def _agree() -> None:
    with Processes.start(device="cpu") as processes:
        assert processes.gather(processes.rank) == list(range(processes.size))
        assert processes.on_main(lambda: processes.rank) == 0
        assert processes.together(lambda: processes.rank) == list(range(processes.size))
        assert processes.each(lambda: processes.rank) == processes.rank
        assert processes.broadcast(os.getpid() if processes.is_main else None) != (
            0 if processes.is_main else os.getpid()
        )
        processes.barrier()


@pytest.mark.slow
def test_processes_agree_and_end_without_a_word(tmp_path: Path) -> None:
    started = time.monotonic()
    spawn(_agree, size=3, folder=tmp_path)
    assert time.monotonic() - started < 60
    assert [path.read_text() for path in sorted(tmp_path.glob("output-*.txt"))] == ["", "", ""]


def _fail_on_main(kind: str) -> None:
    with Processes.start(device="cpu") as processes:
        processes.on_main(lambda: _raise(kind))


def _fail_on_last(kind: str) -> None:
    with Processes.start(device="cpu") as processes:
        processes.together(lambda: _raise(kind) if processes.rank == processes.size - 1 else None)


def _fail_alone_on_last(kind: str) -> None:
    with Processes.start(device="cpu") as processes:
        if processes.rank == processes.size - 1:
            _raise(kind)
        processes.barrier()


def _caught_and_failed_again(kind: str) -> None:
    with Processes.start(device="cpu") as processes:
        try:
            processes.on_main(lambda: _raise(kind))
        except (ShearingError, AgreedEnd):
            if processes.is_main:
                raise OSError("no space left") from None
            processes.barrier()


def _raise(kind: str) -> None:
    if kind == "mendable":
        raise WRONG
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "exit":
        raise SystemExit(7)
    raise OSError("the disk is on fire")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [("mendable", 2), ("other", 1)])
@pytest.mark.parametrize("program", [_fail_on_main, _fail_on_last])
def test_an_error_that_all_agree_on_is_told_once_with_one_code(
    program: Callable[[str], None], kind: str, code: int, tmp_path: Path
) -> None:
    # The harness prints what is raised, as Python does, and ends with 1.
    codes, outputs = _ends(program, kind, folder=tmp_path)
    tells = 0 if program is _fail_on_main else 1
    assert codes[1 - tells] == code
    assert codes[tells] == 1
    assert ("learning_rate" if kind == "mendable" else "the disk is on fire") in outputs[tells]
    assert outputs[1 - tells] == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "code", "expected"),
    [
        ("mendable", 2, "learning_rate"),
        ("other", 1, "the disk is on fire"),
        ("interrupt", 130, "was interrupted"),
        ("exit", 7, "SystemExit: 7"),
    ],
)
def test_an_error_of_one_process_ends_all_with_its_code(kind: str, code: int, expected: str, tmp_path: Path) -> None:
    codes, outputs = _ends(_fail_alone_on_last, kind, folder=tmp_path)
    assert codes == [code, code], outputs
    assert expected in outputs[0]
    if kind == "interrupt":
        assert outputs[1] == ""
        assert "Traceback" not in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [("interrupt", 130), ("exit", 7)])
def test_what_is_not_an_error_on_main_ends_those_that_wait(kind: str, code: int, tmp_path: Path) -> None:
    codes, outputs = _ends(_fail_on_main, kind, folder=tmp_path)
    assert codes == [code, code], outputs


def _file_is_refused(how: str) -> None:
    with Processes.start(device="cpu", mendable=said_of_file) as processes:
        refused = Path("/dev/null/shard.bin").read_bytes
        if how == "together":
            processes.together(lambda: refused() if processes.rank == 1 else None)
        elif how == "alone" and processes.rank == 1:
            refused()
        processes.barrier()


@pytest.mark.slow
def test_a_file_that_the_system_refuses_is_said_in_one_message(tmp_path: Path) -> None:
    codes, outputs = _ends(_file_is_refused, "alone", folder=tmp_path)
    assert codes == [2, 2]
    assert "error in process 1 of 2" in outputs[1]
    assert "/dev/null/shard.bin = 'Not a directory'" in outputs[1]
    assert "Traceback" not in outputs[0] + outputs[1]


@pytest.mark.slow
def test_a_file_that_is_refused_at_an_agreed_point_ends_all_with_code_2(tmp_path: Path) -> None:
    codes, _ = _ends(_file_is_refused, "together", folder=tmp_path)
    assert codes[0] == 2  # the one that met it ends by the error itself, which a command says


@pytest.mark.slow
def test_an_error_after_one_that_was_dealt_with_is_told(tmp_path: Path) -> None:
    codes, outputs = _ends(_caught_and_failed_again, "mendable", folder=tmp_path)
    assert codes == [1, 1]
    assert "no space left" in outputs[0]


def _exchange_for_ever(ready: Path) -> None:
    import torch

    with Processes.start(device="cpu") as processes:
        while True:
            processes.sum(torch.ones(1))
            if processes.is_main:
                ready.touch()
            time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named(victim: int, tmp_path: Path) -> None:
    group = start(_exchange_for_ever, tmp_path / "ready", size=2, folder=tmp_path)
    _wait_for(tmp_path / "ready", group)
    time.sleep(1)
    group.processes[victim].kill()
    time.sleep(2)
    group.processes[1 - victim].terminate()  # as a launcher does that has seen the other die
    started = time.monotonic()
    codes = group.wait(seconds=30)
    assert time.monotonic() - started < 25
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    text = group.outputs[1 - victim].read_text()
    lost = "the main process" if victim == 0 else "process 1"
    assert f"error: process {1 - victim} of 2 on {os.uname().nodename} lost contact with {lost} on" in text
    assert "the same command continues" in text


@pytest.mark.slow
def test_a_killed_main_process_is_named_once_on_its_host(tmp_path: Path) -> None:
    group = start(_exchange_for_ever, tmp_path / "ready", size=3, folder=tmp_path)
    _wait_for(tmp_path / "ready", group)
    group.processes[0].kill()
    assert group.wait(seconds=30) == [-signal.SIGKILL, 1, 1]
    assert "lost contact with the main process on" in group.outputs[1].read_text()
    assert "lost contact" not in group.outputs[2].read_text()


def _comes_only_if_main(seconds: float) -> None:
    if os.environ["RANK"] != "0":
        # As a launcher's agent does: its store counts nobody.
        raise SystemExit(3)
    Processes.start(device="cpu", timeout=seconds)


@pytest.mark.slow
def test_a_process_that_does_not_come_is_an_error_for_the_others(tmp_path: Path) -> None:
    codes, outputs = _ends(_comes_only_if_main, 5.0, folder=tmp_path)
    assert codes == [1, 3]
    assert "MASTER_ADDR" in outputs[0]
    assert "clients joined" in outputs[0]


def _dies_between_watch_and_groups() -> None:
    from shearing.processes import processes, watch

    watch.SILENCE = 8.0
    if os.environ["RANK"] == "1":
        processes._connect = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    processes.Processes.start(device="cpu")


@pytest.mark.slow
def test_a_process_that_dies_before_the_groups_are_made_ends_the_others(tmp_path: Path) -> None:
    group = start(_dies_between_watch_and_groups, size=2, folder=tmp_path)
    assert group.wait(seconds=40) == [1, -signal.SIGKILL]
    assert "process 1 of 2 on" in group.outputs[0].read_text()
    assert "has not been heard of for 8 s" in group.outputs[0].read_text()


def _fails_to_connect() -> None:
    from shearing.processes import processes

    if os.environ["RANK"] == "1":
        processes._connect = lambda *_, **__: _raise("mendable")
    processes.Processes.start(device="cpu")


@pytest.mark.slow
def test_an_error_at_the_start_of_one_process_ends_all(tmp_path: Path) -> None:
    codes, outputs = _ends(_fails_to_connect, folder=tmp_path)
    assert codes == [2, 2]
    assert all("learning_rate" in output for output in outputs)


def _see_one_gpu(called: str) -> None:
    """What a process sees of GPUs: one, whose name begins so."""
    from shearing.processes import processes

    connect = processes._connect
    taken: list[int] = []
    processes._connect = lambda _, **rest: connect("gloo", **rest)
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = taken.append  # type: ignore[assignment]
    torch.cuda.current_device = lambda: taken[-1]
    uuid = called.format(rank=os.environ["RANK"])
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=f"{uuid}-{device}")  # type: ignore[assignment, misc]
    with Processes.start(names={"device": "training.device"}):
        assert taken == [0]


@pytest.mark.slow
def test_a_cluster_may_bind_one_gpu_to_each_process(tmp_path: Path) -> None:
    """Each is number 0 to its process, whatever LOCAL_RANK is."""
    spawn(_see_one_gpu, "GPU-{rank}", size=2, folder=tmp_path)


@pytest.mark.slow
def test_what_one_process_says_for_all_has_the_names_that_people_know(tmp_path: Path) -> None:
    codes, outputs = _ends(_see_one_gpu, "GPU-of-all", folder=tmp_path)
    assert codes == [2, 2]
    assert "for ranks [0, 1]" in outputs[1]
    assert "or training.device=cpu, where there are no more GPUs" in outputs[1]


def _suspended(ready: Path) -> None:
    with Processes.start(device="cpu") as processes:
        if processes.is_main:
            ready.touch()
        time.sleep(8)
        processes.barrier()


@pytest.mark.slow
def test_a_suspended_run_goes_on(tmp_path: Path) -> None:
    group = start(_suspended_with_short_silence, tmp_path / "ready", size=2, folder=tmp_path)
    _wait_for(tmp_path / "ready", group)
    time.sleep(2)
    for process in group.processes:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(12)
    for process in group.processes:
        os.kill(process.pid, signal.SIGCONT)
    assert group.wait(seconds=60) == [0, 0], group.said()


def _suspended_with_short_silence(ready: Path) -> None:
    from shearing.processes import watch

    watch.SILENCE = 8.0
    _suspended(ready)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "0 to WORLD_SIZE - 1 = 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"}, "MASTER_PORT"),
    ],
)
def test_what_a_launcher_left_out_is_asked_for(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ShearingError, match=expected):
        Processes.start(device="cpu")


def test_exit_codes() -> None:
    assert [exit_code(error) for error in (WRONG, OSError(), KeyboardInterrupt(), SystemExit(75))] == [2, 1, 130, 75]


def _ask_each_step() -> None:
    with Processes.start(device="cpu") as processes:
        question = Question(processes)
        answers = [question.ask(step if processes.rank == step % processes.size else 0) for step in range(1, 5)]
        assert answers == [0, 1, 2, 3]
        assert (question.answer(), question.answer()) == (4, 0)


def test_a_question_is_answered_one_step_later(tmp_path: Path) -> None:
    spawn(_ask_each_step, size=2, folder=tmp_path)
    assert Question(Processes()).ask(3) == 3
