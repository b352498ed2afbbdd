"""What a line says of several processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shearing.training.callbacks.metrics import Metrics
from shearing.training.task import StepResult
from shearing.training.trackers import Trackers


class _Others:
    """Processes of which the others have computed this."""

    is_main = True

    def __init__(self, others: list[StepResult]) -> None:
        self.size, self._others = 1 + len(others), others

    def all_gather(self, values: Tensor) -> Tensor:
        """One step of each."""
        of_others = [each.loss if values.ndim == 1 else each.domains for each in self._others]
        return torch.stack([values, *(each[None].to(values.dtype) for each in of_others)])

    def gather(self, value: Any) -> list[Any]:
        """This one's."""
        return [value]


def _of_process(sums: list[float], labels: list[int], *, of: int) -> StepResult:
    """A step of a process with these losses and labels of two domains, among so many labels of all."""
    domains = torch.tensor([sums, labels], dtype=torch.float64).T
    return StepResult(loss=torch.tensor(sum(sums) / of), domains=domains, skipped=torch.tensor(False))


def _line(results: list[StepResult]) -> dict[str, Any]:
    engine = SimpleNamespace(device=torch.device("cpu"), grad_norm=lambda: torch.tensor(1.0))
    task: Any = SimpleNamespace(
        processes=_Others(results[1:]),
        engine=engine,
        masking=None,
        optimization=SimpleNamespace(rates=SimpleNamespace(at=lambda _: 0.0)),
        schedule=SimpleNamespace(sequences_per_step=2, log_interval=1),
        mixture=SimpleNamespace(domains=("letters", "digits"), sequence_length=16),
        objective=SimpleNamespace(measures=()),
        compute=SimpleNamespace(peak_flops=None),
    )
    lines: list[dict[str, Any]] = []
    metrics = Metrics(task)
    run: Any = SimpleNamespace(
        step=1,
        tokens=32,
        ends=False,
        callbacks=[],
        prefetcher=SimpleNamespace(weights_taken={}, wait_seconds=0.0),
        log=lines.append,
    )
    run.report = lambda: metrics.report(run)
    metrics.before_step(run)
    metrics.after_step(run, results[0])
    return lines[0]


def test_the_largest_loss_is_a_mean_over_the_labels_of_its_process() -> None:
    equal = _line([_of_process([8.0, 24.0], [8, 8], of=32), _of_process([48.0, 0.0], [16, 0], of=32)])
    assert (equal["loss"], equal["loss_max"]) == (2.5, 3.0)
    unlike = _line([_of_process([20.0, 40.0], [10, 20], of=40), _of_process([30.0, 0.0], [10, 0], of=40)])
    assert unlike["loss"] == pytest.approx(90 / 40)
    assert unlike["loss_max"] == pytest.approx(3.0)
    without = _line([_of_process([60.0, 0.0], [30, 0], of=30), _of_process([0.0, 0.0], [0, 0], of=30)])
    assert without["loss_max"] == pytest.approx(2.0)


def test_totals_are_of_all_starts_of_a_stage(tmp_path: Path) -> None:
    line = {"seconds": 2.0, "data_wait": 0.5, "skipped": 1, "loss": 3.0, "max_memory": 7, "mfu": None}
    lines = [line, {"event": "mixture", "seconds": 4.0}, {**line, "loss": None}]
    earlier = "".join(f"{json.dumps(each)}\n" for each in lines)
    (tmp_path / "metrics.jsonl").write_text(f"{earlier}{json.dumps(line)}\n")  # the last is computed again
    task: Any = SimpleNamespace(
        processes=SimpleNamespace(is_main=True),
        folder=tmp_path,
        open_trackers=lambda _: Trackers({}),
        schedule=SimpleNamespace(sequences_per_step=2),
        mixture=SimpleNamespace(sequence_length=16),
    )
    metrics = Metrics(task)
    metrics.load_state_dict({"skipped": 1, "metrics_bytes": len(earlier)})
    run: Any = SimpleNamespace(step=2, display=SimpleNamespace(show=lambda _: None))
    metrics.start(run)
    metrics.log(run, {**line, "loss": 2.0})
    metrics.close()
    found = metrics.totals
    assert (found.seconds, found.heldout_seconds, found.data_wait) == (6.0, 4.0, 1.5)
    assert (found.tokens, found.skipped, found.peak_memory) == (96, 1, 7)
    assert found.losses == pytest.approx([3.0, math.nan, 2.0], nan_ok=True)
