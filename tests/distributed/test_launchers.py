"""Every launcher starts the same run: the commands are those that `shear launch` prints."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from shearing.runs.launch import commands
from tests.distributed import runs
from tests.repository import ROOT

pytestmark = pytest.mark.slow

STEPS = 8
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
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def _recipe(inputs: Path, folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(runs.recipe(inputs, run_dir=folder / name, steps=STEPS).to_yaml())
    return path


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
    if shutil.which(launcher, path=str(PROGRAMS)) is None:
        pytest.skip(f"{launcher} is not installed")
    recipe = _recipe(tiny_inputs, tmp_path, "run")
    printed = commands(recipe, overrides=[], nodes=1, processes=2)
    command = next(line for line in printed.splitlines() if line.startswith(launcher))
    said = _run(command.replace(" run ", " prune "), folder=tmp_path)
    print(said)
    assert said.count("prune took") == 1
    _assert_same(tmp_path / "run", alone)
