"""Composer's trainer gives what our loop gives, and continues what was killed. `make test-composer` runs this."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("composer", reason="make test-composer")

from composer.core import Precision

from shearing import ShearingError
from shearing.data import DocumentRules, Mixture
from shearing.evaluation import heldout_loss
from shearing.integrations.composer import LearnMasks, MixtureBatches
from shearing.training.loop import train
from shearing.training.stage import HeldOut
from shearing.training.task import Task
from tests.data.corpus.answers import with_answers, with_beginnings
from tests.integrations.composer import fits
from tests.repository import ROOT
from tests.training import tasks

CLOSE = {"rtol": 0.0, "atol": 1e-5}


def _ours(inputs: Path, folder: Path, *, estimator: str, dynamic: bool) -> tuple[Task, list[dict[str, Any]]]:
    """The task after our own loop, and the lines of its metrics."""
    task = tasks.tiny_task(inputs, folder, estimator=estimator)
    if dynamic:
        model, corpus = task.objective.model, task.mixture.corpus

        def measure(forward: Any, advance: Any) -> dict[str, float]:
            measured = heldout_loss(
                model,
                corpus,
                split="validation",
                tokens_per_domain=fits.HELD_OUT_TOKENS,
                sequence_length=tasks.LENGTH,
                micro_batch_size=tasks.MICRO_BATCH,
                objective=forward,
            )
            return {domain: loss.loss for domain, loss in measured.items()}

        task = dataclasses.replace(task, dynamic=fits.dynamic_mixture(), heldout=HeldOut(tokens=128, measure=measure))
    train(task, console=Console(file=io.StringIO()))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return task, [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("estimator", "dynamic"), [("hard_concrete", False), ("straight_through", False), ("straight_through", True)]
)
def test_composer_ends_where_our_loop_does(tiny_inputs: Path, tmp_path: Path, estimator: str, dynamic: bool) -> None:
    task, lines = _ours(tiny_inputs, tmp_path, estimator=estimator, dynamic=dynamic)
    theirs = fits.fit(tiny_inputs, estimator=estimator, dynamic=dynamic)
    steps = [line for line in lines if "event" not in line]
    losses = torch.tensor([line["loss"] for line in steps])
    torch.testing.assert_close(torch.tensor(theirs["losses"]), losses, **CLOSE)
    for name, weight in task.objective.named_parameters():
        torch.testing.assert_close(theirs["weights"][name], weight.detach(), **CLOSE)
    assert task.masking is not None
    ours = task.masking.state_dict()
    for name, value in ours["log_alpha"].items():
        torch.testing.assert_close(theirs["masking"]["log_alpha"][name], value, **CLOSE)
    for name, value in ours["frozen"].items():
        assert torch.equal(theirs["masking"]["frozen"][name], value)
    updates = [line for line in lines if line.get("event") == "mixture"]
    assert len(updates) == (1 if dynamic else 0)
    if dynamic:
        # Ours leaves out the update after step 6, whose weights no step would see.
        assert theirs["domain_weights"] != pytest.approx({"letters": 0.5, "digits": 0.5})
        assert "heldout/letters" in theirs["logged"]


def _start(inputs: Path, folder: Path, *, more: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integrations.composer.fits", str(inputs), str(folder), *more],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )


def _same(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight), name
    for name, value in first["masking"]["log_alpha"].items():
        assert torch.equal(second["masking"]["log_alpha"][name], value), name
    assert first["domain_weights"] == second["domain_weights"]


@pytest.mark.slow
def test_what_is_killed_continues_from_composers_checkpoint(tiny_inputs: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _start(tiny_inputs, whole).wait() == 0
    assert _start(tiny_inputs, killed, more=("--kill-after", "5")).wait() == -signal.SIGKILL
    assert not (killed / "result.pt").exists()
    assert _start(tiny_inputs, killed).wait() == 0
    first, second = (torch.load(folder / "result.pt", weights_only=False) for folder in (whole, killed))
    assert len(second["losses"]) == tasks.STEPS - 4
    assert second["losses"] == first["losses"][4:]
    _same(first, second)


@pytest.mark.slow
def test_two_processes_end_where_one_does(tiny_inputs: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common["NODE_RANK"] = "0"
    both = [_start(tiny_inputs, tmp_path / "two", RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    one = fits.fit(tiny_inputs, dynamic=True)
    two = torch.load(tmp_path / "two" / "result.pt", weights_only=False)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, **CLOSE)
    for name, value in one["masking"]["log_alpha"].items():
        torch.testing.assert_close(two["masking"]["log_alpha"][name], value, **CLOSE)


def test_what_is_not_right_is_refused(tiny_inputs: Path, tmp_path: Path) -> None:
    mixture = tasks.mixture_of(tiny_inputs)
    within = Mixture(
        mixture.corpus,
        seed=0,
        sequence_length=tasks.LENGTH,
        weights=mixture.weights,
        documents=DocumentRules(attention_within=True),
    )
    with pytest.raises(ShearingError, match="without document rules"):
        MixtureBatches(within, sequences_per_step=4)
    with_beginnings(tiny_inputs / "corpus", tmp_path / "begun" / "corpus")
    with pytest.raises(ShearingError, match="prepare it with bos: row or none"):
        MixtureBatches(tasks.mixture_of(tmp_path / "begun"), sequences_per_step=4)
    with_answers(tiny_inputs / "corpus", tmp_path / "corpus", domain="letters")
    with pytest.raises(ShearingError, match="some tokens do not count"):
        MixtureBatches(tasks.mixture_of(tmp_path), sequences_per_step=4)
    _, masking = tasks.masked_objective(tiny_inputs)
    algorithm = LearnMasks(masking)

    class State:
        precision, fsdp_enabled = Precision.AMP_FP16, False

    state: Any = State()
    logger: Any = None
    with pytest.raises(ShearingError, match="amp_bf16"):
        algorithm.check(state, logger)
    state.precision, state.fsdp_enabled = Precision.FP32, True
    with pytest.raises(ShearingError, match="fsdp"):
        algorithm.check(state, logger)
    state.batch, state.device_train_microbatch_size = {"input_ids": torch.zeros(4, 8)}, 4
    algorithm.start_batch(state, logger)
    with pytest.raises(ShearingError, match="each a multiple of the micro-batch of 4"):
        algorithm.start_attempt(state, logger)
    state.device_train_microbatch_size = 2
    algorithm.start_attempt(state, logger)


def test_a_fit_that_ends_early_leaves_the_masks_that_are_cut(tiny_inputs: Path) -> None:
    _, masking = tasks.masked_objective(tiny_inputs)
    algorithm, nothing = LearnMasks(masking), None
    algorithm.end(nothing, nothing)
    algorithm.settle(nothing, nothing)  # of evaluators behind the fit
    for name, mask in masking.learner.final_masks().tensors().items():
        assert torch.equal(masking.model.masks.tensors()[name], mask), name
