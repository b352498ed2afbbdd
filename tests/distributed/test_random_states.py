"""Every process goes on with its own random numbers where a run is continued."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from shearing.processes.processes import Processes
from shearing.training.engines.torch_engine import TorchEngine
from shearing.training.loop import train
from shearing.training.task import Callback, Run
from tests.distributed.harness import spawn
from tests.training import tasks

CONTINUED = 4


class Draws(Callback):
    """What dropout would draw in each step."""

    def __init__(self) -> None:
        self.numbers: dict[int, float] = {}

    def before_step(self, run: Run) -> None:
        self.numbers[run.step] = float(torch.rand(()))


def _drawn(inputs: Path, folder: Path, processes: Processes) -> dict[int, float]:
    draws = Draws()
    task = tasks.tiny_task(inputs, folder, callbacks=(draws,), micro_batch_size=1)
    engine = TorchEngine(task.optimization, device=tasks.CPU, precision=torch.float32, processes=processes)
    task = dataclasses.replace(task, processes=processes, engine=engine)
    train(task, console=Console(file=io.StringIO()))
    return draws.numbers


def _continue(inputs: Path, folder: Path) -> None:
    """What every process runs."""
    with Processes.start(device="cpu") as processes:
        torch.manual_seed(processes.rank)
        whole = _drawn(inputs, folder, processes)
        everyone = processes.gather(whole[CONTINUED])
        assert len(set(everyone)) == processes.size
        if processes.is_main:
            for later in (folder / "checkpoints").glob("step-*"):
                if int(later.name.removeprefix("step-")) > CONTINUED:
                    shutil.rmtree(later)
        processes.barrier()
        torch.manual_seed(0)
        found = _drawn(inputs, folder, processes)
        assert found == {step: number for step, number in whole.items() if step >= CONTINUED}


def _begin_alone(inputs: Path, folder: Path) -> None:
    """What every process runs: of a run of one, its last steps."""
    with Processes.start(device="cpu") as processes:
        everyone = processes.gather(_drawn(inputs, folder, processes))
        assert len({numbers[CONTINUED] for numbers in everyone}) == processes.size


@pytest.mark.slow
def test_random_numbers_go_on_where_they_were(tiny_inputs: Path, tmp_path: Path) -> None:
    spawn(_continue, tiny_inputs, tmp_path / "stage", size=2, folder=tmp_path / "out")


@pytest.mark.slow
def test_processes_that_a_run_did_not_have_before_draw_numbers_of_their_own(tiny_inputs: Path, tmp_path: Path) -> None:
    _drawn(tiny_inputs, tmp_path / "stage", Processes())
    for later in (tmp_path / "stage" / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > CONTINUED:
            shutil.rmtree(later)
    spawn(_begin_alone, tiny_inputs, tmp_path / "stage", size=2, folder=tmp_path / "out")
