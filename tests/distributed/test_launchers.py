"""Every launcher starts the same run, by the commands that `shear launch` prints, and takes it along when killed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from shearing.runs.launch import commands
from shearing.runs.recipe import load_recipe
from shearing.runs.run_directory import RunDirectory, Stage
from shearing.training.stage import INTERRUPTED_EXIT_CODE
from tests.distributed import runs
from tests.distributed.harness import spawn
from tests.repository import ROOT

pytestmark = pytest.mark.slow

STEPS = 8
LONG = 100
"""Steps of a run that is still at work a second after its launcher was killed."""
TOLERANCE = 1e-5
PROGRAMS = Path(sys.executable).parent


def _environment() -> dict[str, str]:
    """As in the shell of a user who has activated the environment of the programs."""
    rest = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "DS_"))}
    return rest | {
        "PATH": os.pathsep.join([str(PROGRAMS), rest["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [rest.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _run(command: str, *, folder: Path) -> str:
    """What a command of the shell printed; it has to end well."""
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def _recipe(inputs: Path, folder: Path, name: str, *, steps: int = STEPS) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(runs.recipe(inputs, run_dir=folder / name, steps=steps).to_yaml())
    return path


def _command(launcher: str, recipe: Path) -> str:
    """What `shear launch` prints for two processes, for mask learning alone; of `shearing`, its own start of them."""
    if launcher == "shearing":
        return f"{shlex.quote(sys.executable)} -m shearing prune --gpus 2 {recipe}"
    if shutil.which(launcher, path=str(PROGRAMS)) is None:
        pytest.skip(f"{launcher} is not installed")
    printed = commands(recipe, overrides=[], nodes=1, processes=2)
    return next(line for line in printed.splitlines() if line.startswith(launcher)).replace(" run ", " prune ")


@pytest.fixture(scope="module")
def alone(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the run in one process, without a launcher."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = _recipe(tiny_inputs, folder, "alone")
    said = _run(f"{shlex.quote(sys.executable)} -m shearing prune {recipe}", folder=folder)
    assert said.count("prune took") == 1
    return folder / "alone"


def _assert_same(found: Path, expected: Path) -> None:
    assert len(runs.lines(found, "prune")) >= STEPS
    assert runs.difference(runs.trajectory(found, "prune"), runs.trajectory(expected, "prune")) < TOLERANCE
    ours, theirs = (load_file(run_dir / "prune" / "masks.safetensors") for run_dir in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert abs(values - theirs[name]).max() < TOLERANCE, name


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "deepspeed"])
def test_a_launcher_does_what_one_process_does(launcher: str, tiny_inputs: Path, tmp_path: Path, alone: Path) -> None:
    recipe = _recipe(tiny_inputs, tmp_path, "run")
    said = _run(_command(launcher, recipe), folder=tmp_path)
    print(said)
    assert said.count("prune took") == 1
    _assert_same(tmp_path / "run", alone)


def test_the_program_starts_its_processes_itself(tiny_inputs: Path, tmp_path: Path, alone: Path) -> None:
    command = _command("shearing", _recipe(tiny_inputs, tmp_path, "run"))
    said = _run(command, folder=tmp_path)
    assert said.count("prune took") == 1
    _assert_same(tmp_path / "run", alone)
    wrong = subprocess.run(
        ["bash", "-c", f"{command} data.domains=[nowhere] run_dir=other"],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert wrong.returncode == 2, wrong.stderr
    assert wrong.stderr.count("to mend:") == 1, wrong.stderr
    assert "exitcode" not in wrong.stderr


@pytest.fixture(scope="module")
def uninterrupted(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the long run in two processes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = runs.recipe(tiny_inputs, run_dir=folder / "run", steps=LONG)
    spawn(runs.train, recipe, ("prune",), size=2, folder=folder / "out")
    return folder / "run"


@contextmanager
def _working(
    command: str, *, folder: Path, until: Callable[[], bool], environment: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A launcher whose processes have come so far, and where they print to; killed in the end."""
    output = folder / "output.txt"
    with (
        output.open("w") as file,
        subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=folder,
            env=_environment() | (environment or {}),
            stdout=file,
            stderr=file,
        ) as launcher,
    ):
        try:
            deadline = time.monotonic() + 180
            while not until():
                assert launcher.poll() is None, output.read_text()
                assert time.monotonic() < deadline, output.read_text()
                time.sleep(0.05)
            yield launcher, output
        finally:
            launcher.kill()


def _training(command: str, *, folder: Path) -> AbstractContextManager[tuple[subprocess.Popen[bytes], Path]]:
    """A launcher whose processes have written a checkpoint."""
    checkpoints = RunDirectory(folder / "run").checkpoints("prune")
    return _working(command, folder=folder, until=lambda: any(checkpoints.glob("step-*")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_program_stops_its_processes_in_order(number: signal.Signals, tiny_inputs: Path, tmp_path: Path) -> None:
    command = _command("shearing", _recipe(tiny_inputs, tmp_path, "run", steps=LONG))
    with _training(command, folder=tmp_path) as (launcher, output):
        launcher.send_signal(number)
        assert launcher.wait(timeout=60) == INTERRUPTED_EXIT_CODE, output.read_text()
    done = runs.lines(tmp_path / "run", "prune")[-1]["step"]
    assert (tmp_path / "run" / "prune" / "checkpoints" / f"step-{done:08d}").is_dir(), output.read_text()
    assert output.read_text().count("the same command continues from there") == 1


def _kill_while_training(command: str, *, folder: Path) -> tuple[str, list[psutil.Process]]:
    """What a launcher that was killed and its processes have printed, and those of them that are left after 30 s."""
    return _kill(_training(command, folder=folder))


def _kill(working: AbstractContextManager[tuple[subprocess.Popen[bytes], Path]]) -> tuple[str, list[psutil.Process]]:
    with working as (launcher, output):
        below = psutil.Process(launcher.pid).children(recursive=True)
    _, left = psutil.wait_procs(below, timeout=30)
    for each in left:
        each.kill()
    return output.read_text(), left


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "deepspeed", "shearing"])
def test_a_launcher_that_is_killed_takes_its_processes_along_and_is_continued(
    launcher: str, tiny_inputs: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    command = _command(launcher, _recipe(tiny_inputs, tmp_path, "run", steps=LONG))
    said, left = _kill_while_training(command, folder=tmp_path)
    assert not left, said
    assert said.count(f"error: {launcher} (process") == 1, said
    assert said.count("the same command continues") == 1, said
    assert 0 < len(runs.lines(tmp_path / "run", "prune")) < LONG
    assert "continuing prune from step" in _run(command, folder=tmp_path)
    ours, theirs = (dict(runs.contents(run_dir, "prune")) for run_dir in (tmp_path / "run", uninterrupted))
    assert ours.keys() == theirs.keys()
    for name, content in ours.items():
        assert content == theirs[name], name


_STUCK = """
import importlib.abc, importlib.util, pathlib, sys, time


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def patched(module):
            execute(module)
            *owners, last = {function!r}.split(".")
            owner = module
            for each in owners:
                owner = getattr(owner, each)

            def stuck(*_, **__):
                pathlib.Path({sign!r}).touch()
                time.sleep(600)

            setattr(owner, last, stuck)

        spec.loader.exec_module = patched
        return spec


sys.meta_path.insert(0, Finder())
"""
"""A `sitecustomize` with which one function of every process never returns."""


@pytest.mark.parametrize(
    ("launcher", "stage", "function"),
    [
        ("torchrun", "prune", "shearing.pruning.structured.importance.activations:Activations.scores"),
        ("deepspeed", "prune", "shearing.training.checkpoints.pieces:StagedPieces.write"),
        ("accelerate", "evaluate", "shearing.runs.stages.evaluate:evaluate"),
    ],
    ids=["importance", "checkpoint", "evaluation"],
)
def test_a_launcher_that_is_killed_in_another_phase(
    launcher: str, stage: str, function: str, tiny_inputs: Path, tmp_path: Path
) -> None:
    """Nothing is left, and the same command ends as a run that nothing interrupted."""
    path = _recipe(tiny_inputs, tmp_path, "run")
    recipe = load_recipe(path, overrides=["prune.initial_masks=activations", "prune.sparsity_warmup=0 steps"])
    path.write_text(recipe.to_yaml())
    command = _command(launcher, path)
    if stage == "evaluate":
        command = command.replace(" prune ", " run ")
    sign, (module, name) = tmp_path / "sign", function.split(":")
    (tmp_path / "stuck").mkdir()
    stuck = _STUCK.format(module=module, function=name, sign=str(sign))
    (tmp_path / "stuck" / "sitecustomize.py").write_text(stuck)
    inside = os.pathsep.join([str(tmp_path / "stuck"), _environment()["PYTHONPATH"]])
    said, left = _kill(_working(command, folder=tmp_path, until=sign.exists, environment={"PYTHONPATH": inside}))
    assert not left, said
    assert said.count(f"error: {launcher} (process") == 1, said
    _run(command, folder=tmp_path)
    expected = load_recipe(path, overrides=[f"run_dir={tmp_path / 'expected'}"])
    stages: tuple[Stage, ...] = ("prune",) if stage == "prune" else expected.stages
    spawn(runs.train, expected, stages, size=2, folder=tmp_path / "out")
    ours, theirs = (dict(runs.contents(tmp_path / name, "prune")) for name in ("run", "expected"))
    assert ours.keys() == {each.replace("expected", "run") for each in theirs}
    for own, content in ours.items():
        assert content == theirs[own], own
    if stage == "evaluate":
        tables = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("run", "expected")]
        ours, theirs = ({model: row["domains"] for model, row in table["models"].items()} for table in tables)
        assert ours == theirs
