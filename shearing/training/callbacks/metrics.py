"""Metrics: figures of every step, read from the device every few steps, to metrics.jsonl, trackers and the display.

Shapes: P processes, N steps read at once, M domains, K measures of the objective.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from shearing.progress import max_memory
from shearing.training.callbacks.figures import read_scalars, step_line
from shearing.training.metrics import MetricsLog, StageTotals
from shearing.training.task import Callback, Run, StepResult, Task
from shearing.training.trackers import Trackers


@dataclass(frozen=True, kw_only=True)
class _Unread:
    """A step whose figures are still on the device.

    Attributes:
        known: what its line says that the host knows.
        figures: scalars.
        domains: see `StepResult`.
    """

    known: dict[str, Any]
    figures: dict[str, Tensor]
    domains: Tensor


class Metrics(Callback):
    """Keeps each step's figures on the device until they are read, all in one transfer; then writes their lines."""

    def __init__(self, task: Task) -> None:
        self.totals = StageTotals()
        self._task = task
        self._trackers = Trackers({})
        self._file: MetricsLog | None = None
        self._num_bytes = 0
        self._skipped = 0
        self._unread: list[_Unread] = []
        self._mark = self._wait_mark = 0.0

    @override
    def start(self, run: Run) -> None:
        """Open metrics.jsonl and the trackers, on the main process."""
        if self._task.processes.is_main:
            self._file = MetricsLog(self._task.folder / "metrics.jsonl", num_bytes=self._num_bytes)
            for line in self._file.read():  # of earlier starts
                self.totals.add(line, tokens=self._tokens_per_step())
            self._trackers = self._task.open_trackers(run.step + 1)

    @override
    def before_step(self, run: Run) -> None:
        """Start the clock anew after a report: what came since then is no part of the steps."""
        if not self._unread:
            self._mark = time.monotonic()
            self._wait_mark = run.prefetcher.wait_seconds

    @override
    def after_step(self, run: Run, result: StepResult) -> None:
        """Take note of a step; read from the device when it is time to."""
        task, done_before = self._task, run.step - 1
        figures = {"loss": result.loss, "grad_norm": task.engine.grad_norm(), "skipped": result.skipped}
        if task.masking is not None:
            figures |= task.masking.metrics(step=done_before)
        known = {
            "step": run.step,
            "tokens": run.tokens,
            "learning_rate": task.optimization.rates.at(done_before),
            "weights": run.prefetcher.weights_taken,
        }
        self._unread.append(_Unread(known=known, figures=figures, domains=result.domains))
        if run.ends or run.step % task.schedule.log_interval == 0:
            run.report()

    @override
    def report(self, run: Run) -> None:
        """Read all steps since the last report, and log their lines."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        of_processes_PNMK = self._task.processes.all_gather(torch.stack([step.domains for step in unread]))
        self._sum_losses(unread, labels_PN=of_processes_PNMK[..., 1].sum(-1))
        values = read_scalars([step.figures for step in unread], device=self._task.engine.device)
        of_domains = self._read_domains(of_processes_PNMK.sum(0))
        seconds = (time.monotonic() - self._mark) / len(unread)
        waited = (run.prefetcher.wait_seconds - self._wait_mark) / len(unread)
        told = [callback.tell() for callback in run.callbacks]
        everywhere = self._task.processes.gather((waited, max_memory(), told))
        for index, callback in enumerate(run.callbacks):
            callback.hear(run, [of_process[index] for _, _, of_process in everywhere])
        aside = {
            **self._speed(seconds),
            "data_wait": max(wait for wait, _, _ in everywhere),
            "seconds": seconds,
            "max_memory": max(peak for _, peak, _ in everywhere),
        }
        for step, figures, of_domain in zip(unread, values, of_domains, strict=True):
            self._skipped += int(figures["skipped"])
            line = step_line(step.known, figures | {"skipped": self._skipped})
            run.log({**line, **of_domain, **aside})

    @override
    def log(self, run: Run, line: Mapping[str, Any]) -> None:
        """Write a line wherever lines go."""
        if self._file is not None:
            self._file.write(line)
            self._trackers.log(line)
        self.totals.add(line, tokens=self._tokens_per_step())
        run.display.show(line)

    @override
    def close(self) -> None:
        """Close metrics.jsonl and the trackers."""
        self._trackers.close()
        if self._file is not None:
            self._file.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Skipped steps so far, and how much of metrics.jsonl there is; it is on disk."""
        return {"skipped": self._skipped, "metrics_bytes": 0 if self._file is None else self._file.sync()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._skipped, self._num_bytes = state["skipped"], state["metrics_bytes"]

    def _tokens_per_step(self) -> int:
        return self._task.schedule.sequences_per_step * self._task.mixture.sequence_length

    def _speed(self, seconds: float) -> dict[str, float | None]:
        """Tokens per second of all processes, of one, and as a share of the hardware's peak."""
        everywhere = self._tokens_per_step() / max(seconds, 1e-9)
        each = everywhere / self._task.processes.size
        compute = self._task.compute
        mfu = None if compute.peak_flops is None else each * compute.flops_per_token / compute.peak_flops
        return {"tokens_per_second": everywhere, "tokens_per_second_per_gpu": each, "mfu": mfu}

    def _sum_losses(self, unread: list[_Unread], *, labels_PN: Tensor) -> None:
        """Turn each process's share of the losses into the step's loss, and the largest mean of a process's own."""
        shares_PN = self._task.processes.all_gather(torch.stack([step.figures["loss"] for step in unread]))
        # A share is of the mean over all labels; of equally many, a process's own mean is `size` times it, to the bit.
        means_PN = shares_PN * (labels_PN.sum(0) / labels_PN.clamp(min=1)).to(shares_PN.dtype)
        for step, total, largest in zip(unread, shares_PN.sum(0), means_PN.amax(0), strict=True):
            step.figures["loss"] = total
            step.figures["loss_max"] = largest

    def _read_domains(self, of_steps_NMK: Tensor) -> list[dict[str, dict[str, float]]]:
        """Of each domain that a step had text of, over all processes: labels, mean loss, means of what is measured."""
        domains, measures = self._task.mixture.domains, self._task.objective.measures
        lines = []
        for step in of_steps_NMK.tolist():
            seen = {domain: sums for domain, sums in zip(domains, step, strict=True) if sums[1]}
            line = {
                "domain_tokens": {domain: int(sums[1]) for domain, sums in seen.items()},
                "domain_losses": {domain: sums[0] / sums[1] for domain, sums in seen.items()},
            }
            for place, name in enumerate(measures, start=2):
                line[f"domain_{name}"] = {domain: sums[place] / sums[1] for domain, sums in seen.items()}
            lines.append(line)
        return lines
