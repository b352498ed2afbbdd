"""Two hosts, one of which is cut off: network namespaces with addresses and names of their own, and a cable."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from shearing.runs.run_directory import RunDirectory
from tests.distributed import runs
from tests.repository import ROOT

pytestmark = pytest.mark.slow

STEPS = 60
PORT = 29400


@dataclass(frozen=True)
class Host:
    """A network namespace.

    Attributes:
        name: of the namespace and of the host.
        interface: its end of the cable.
        address: of that end.
    """

    name: str
    interface: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """As the host would run it: with its network and under its name."""
        renamed = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.name, *renamed, *arguments]

    def link(self, state: str) -> None:
        """Plug the cable in (`up`) or out (`down`)."""
        _ip("-n", self.name, "link", "set", self.interface, state)


@dataclass
class Launched:
    """A launcher under way on a host, in a session of its own."""

    process: subprocess.Popen[bytes]
    output: Path

    def said(self) -> str:
        """All that it and its worker printed."""
        return self.output.read_text()

    def kill(self) -> None:
        """End it and its workers, which torchrun puts into sessions of their own, at once."""
        for pid in [*_descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.wait()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _descendants(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [*_descendants(child), child]
    return found


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them; skips where namespaces are not permitted."""
    missing = [program for program in ("ip", "unshare", "hostname") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"network namespaces need {', '.join(missing)}")
    tag = os.getpid()
    first, second = (Host(f"shear-{tag}-{end}", f"sh{tag}{end}", f"10.77.{tag % 250}.{end}") for end in (1, 2))
    try:
        try:
            for host in (first, second):
                _ip("netns", "add", host.name)
            cable = ("type", "veth", "peer", "name", second.interface, "netns", second.name)
            _ip("link", "add", first.interface, "netns", first.name, *cable)
            for host in (first, second):
                _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
                _ip("-n", host.name, "link", "set", "lo", "up")
                host.link("up")
                subprocess.run(host.command("true"), check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield first, second
    finally:
        for host in (first, second):
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)


@pytest.fixture
def launch(hosts: tuple[Host, Host], tmp_path: Path) -> Iterator[Callable[..., list[Launched]]]:
    """Starts torchrun on both hosts; what is left at the end of the test is killed."""
    started: list[Launched] = []

    def start(name: str, recipe: Path, *, interfaces: bool = True) -> list[Launched]:
        both = [
            _torchrun(hosts, rank, recipe, output=tmp_path / f"{name}-{rank}.txt", interfaces=interfaces)
            for rank in range(2)
        ]
        started.extend(both)
        return both

    yield start
    for launched in started:
        launched.kill()


def _torchrun(hosts: Sequence[Host], rank: int, recipe: Path, *, output: Path, interfaces: bool) -> Launched:
    host = hosts[rank]
    command = host.command(
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}"),
        *(f"--master-addr={hosts[0].address}", f"--master-port={PORT}", "-m", "shearing", "prune", str(recipe)),
    )
    environment = {
        **{name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"},
        # gloo would look the host's name up, which nobody knows here; docs/distributed.md says the same to users.
        **({"GLOO_SOCKET_IFNAME": host.interface} if interfaces else {}),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with output.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    return Launched(process, output)


def _wait_until(condition: Callable[[], bool], *, seconds: float, both: Sequence[Launched]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        said = "\n".join(launched.said() for launched in both)
        assert time.monotonic() < deadline, f"not within {seconds} s:\n{said}"
        time.sleep(0.05)


def _end(both: Sequence[Launched], *, seconds: float) -> list[int | None]:
    _wait_until(lambda: all(each.process.poll() is not None for each in both), seconds=seconds, both=both)
    return [each.process.returncode for each in both]


def test_a_host_that_is_cut_off_ends_the_run_which_continues(
    hosts: tuple[Host, Host], launch: Callable[..., list[Launched]], tiny_inputs: Path, tmp_path: Path
) -> None:
    recipe, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(runs.recipe(tiny_inputs, run_dir=run_dir, steps=STEPS).to_yaml())
    first, second = hosts
    both = launch("cut", recipe)
    checkpoints = RunDirectory(run_dir).checkpoints("prune")
    _wait_until(lambda: any(checkpoints.glob("step-*")), seconds=120, both=both)
    second.link("down")
    codes = _end(both, seconds=75)  # 45 s of silence, and what the launcher takes
    texts = [launched.said() for launched in both]
    assert all(codes), texts
    assert f"error: process 1 of 2 on {second.name} has not been heard of for 45 s" in texts[0]
    assert (
        f"error: process 1 of 2 on {second.name} has had no contact with the main process on {first.name}" in texts[1]
    )
    for text in texts:
        assert text.count("the same command continues from the last checkpoint") == 1
        assert "Traceback" not in text.partition("error: process")[0]
    assert 0 < len(runs.lines(run_dir, "prune")) < STEPS
    second.link("up")
    again = launch("again", recipe)
    assert _end(again, seconds=240) == [0, 0], "\n".join(launched.said() for launched in again)
    assert "continuing prune from step" in again[0].said()
    steps = [line["step"] for line in runs.lines(run_dir, "prune") if "event" not in line]
    assert steps == list(range(1, STEPS + 1))


def test_a_host_without_its_name_in_the_network_is_told_what_to_set(
    hosts: tuple[Host, Host],
    launch: Callable[..., list[Launched]],
    tiny_inputs: Path,
    tmp_path: Path,
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(runs.recipe(tiny_inputs, run_dir=tmp_path / "run", steps=STEPS).to_yaml())
    both = launch("loopback", recipe, interfaces=False)
    codes = _end(both, seconds=120)
    assert all(codes)
    assert any("error in process" in each.said() and "GLOO_SOCKET_IFNAME" in each.said() for each in both)
