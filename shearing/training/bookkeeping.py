"""What goes on around the steps of a stage: figures, checkpoints, domain weights, requests to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from typing_extensions import Self

from shearing.data.documents import Documents
from shearing.data.mixture.averages import LossAverages
from shearing.data.mixture.dynamic import DynamicMixture, State
from shearing.data.mixture.prefetcher import Prefetcher
from shearing.errors import ShearingError
from shearing.files.durable import read_json
from shearing.objectives.language_model import Losses
from shearing.progress import max_memory
from shearing.training.checkpoints.checkpoints import FINGERPRINTS, Checkpoints
from shearing.training.checkpoints.fingerprints import Fingerprints
from shearing.training.checkpoints.state import random_states, read_state, set_random_states, write_state
from shearing.training.metrics import Display, MetricsLog, StageTotals
from shearing.training.stage import PREFETCHED_STEPS, Task
from shearing.training.trackers import Trackers


@dataclass(frozen=True, kw_only=True)
class _StepLosses:
    """A process's share of a step's losses, on the device.

    Attributes:
        loss: of the step's mean loss per token; scalar.
        domains: fp64 [M, 2], of each domain's sum in nats, and of its number of labels.
    """

    loss: Tensor
    domains: Tensor


@dataclass
class _Run:
    """The state of a stage under way, and its output."""

    task: Task
    model: nn.Module
    console: Console
    checkpoints: Checkpoints
    log: MetricsLog | None
    trackers: Trackers
    display: Display
    prefetcher: Prefetcher
    stop: _StopRequest
    step: int
    skipped: Tensor
    skipped_in_row: Tensor
    averages: LossAverages | None
    mixture_rule: State
    totals: StageTotals = field(default_factory=StageTotals)
    _agreed_stop: str | None = None
    _unread: list[tuple[dict[str, Any], dict[str, Tensor]]] = field(default_factory=list)
    _unread_domains: list[Tensor] = field(default_factory=list)
    _mark: float = field(default_factory=time.monotonic)
    _wait_mark: float = 0.0

    @classmethod
    def start(cls, task: Task, *, console: Console, stop: _StopRequest) -> _Run:
        """Restore the newest checkpoint if there is one."""
        processes = task.processes
        checkpoints = Checkpoints(
            task.folder / "checkpoints",
            keep_last=task.schedule.keep_last,
            keep_every=task.schedule.keep_every,
            processes=processes,
        )
        newest = checkpoints.newest()
        state: dict[str, Any] = {"step": 0, "skipped": 0, "skipped_in_row": 0, "metrics_bytes": 0}
        if newest is None and task.before_first_step is not None:
            processes.on_main(task.before_first_step)
        model = task.engine.prepare(task.objective)
        model.train()
        averages = None if task.average_weight is None else LossAverages(weight=task.average_weight)
        if newest is not None:
            state = read_state(newest, "state")
            task.engine.load(newest, saved=read_json(newest / FINGERPRINTS))
            task.mixture.load_state_dict(state["mixture"])
            if task.masking is not None:
                task.masking.learner.load_state_dict(state["masks"])
            if averages is not None:
                averages.load_state_dict(state["averages"])
            set_random_states(state["random"])
            console.print(f"continuing {task.name} from step {state['step']} ({newest})", soft_wrap=True)
        elif task.moments is not None:
            task.engine.load_moments(task.moments)
        if task.kept is not None:
            task.engine.keep_zeros(task.kept())
        log = None
        if processes.is_main:
            log = MetricsLog(task.folder / "metrics.jsonl", num_bytes=state["metrics_bytes"])
        prefetcher = Prefetcher(
            task.mixture,
            sequences_per_step=task.schedule.sequences_per_step,
            rank=processes.rank,
            world_size=processes.size,
            depth=PREFETCHED_STEPS,
        )
        display = Display(task.name, total_steps=task.schedule.total_steps, done_steps=state["step"], console=console)
        return cls(
            task=task,
            model=model,
            console=console,
            checkpoints=checkpoints,
            log=log,
            trackers=task.open_trackers(state["step"] + 1) if processes.is_main else Trackers({}),
            display=display,
            prefetcher=prefetcher,
            stop=stop,
            step=state["step"],
            skipped=torch.tensor(state["skipped"], device=task.engine.device),
            skipped_in_row=torch.tensor(state["skipped_in_row"], device=task.engine.device),
            averages=averages,
            # A checkpoint of a version whose rules remembered nothing has no such entry.
            mixture_rule=state.get("mixture_rule", {} if task.dynamic is None else task.dynamic.state),
        )

    def __enter__(self) -> Self:
        self.display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.display.__exit__(kind, error, traceback)
        self.prefetcher.close()
        self.trackers.close()
        if self.log is not None:
            self.log.close()

    @property
    def stopping(self) -> str | None:
        """The signal that asked this run to stop; among several processes, once all of them know."""
        return self.stop.requested if self.task.processes.size == 1 else self._agreed_stop

    def record(self, losses: _StepLosses, *, skipped: Tensor) -> None:
        """Count one step; its figures stay on the device until `report`."""
        self.skipped = self.skipped + skipped
        self.skipped_in_row = (self.skipped_in_row + 1) * skipped
        self._unread_domains.append(losses.domains)
        figures = {
            "loss": losses.loss,
            "grad_norm": self.task.engine.grad_norm(),
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
        }
        if self.task.masking is not None:
            figures |= self.task.masking.learner.metrics(step=self.step)
        learning_rate = self.task.optimization.learning_rate_at(self.step)
        self.step += 1
        schedule = self.task.schedule
        known = {
            "step": self.step,
            "tokens": self.step * schedule.sequences_per_step * self.task.mixture.sequence_length,
            "learning_rate": learning_rate,
            "weights": self.prefetcher.weights,
        }
        self._unread.append((known, figures))

    def report(self) -> None:
        """Read the figures of all steps since the last report from the device, in one transfer, and write them.

        Raises:
            ShearingError: too many steps in a row were not finite; a checkpoint is written first.
        """
        if not self._unread:
            return
        self._sum_losses()
        values = _read([figures for _, figures in self._unread], device=self.task.engine.device)
        of_domains = self._read_domains()
        seconds = (time.monotonic() - self._mark) / len(values)
        waited = (self.prefetcher.wait_seconds - self._wait_mark) / len(values)
        everywhere = self.task.processes.gather((waited, max_memory(), self.stop.requested))
        waited = max(wait for wait, _, _ in everywhere)
        memory = max(peak for _, peak, _ in everywhere)
        self._agreed_stop = next((name for _, _, name in everywhere if name), None)
        tokens = self.task.schedule.sequences_per_step * self.task.mixture.sequence_length
        for (known, _), figures, domain_losses in zip(self._unread, values, of_domains, strict=True):
            if self.averages is not None:
                self.averages.add(domain_losses)
            line = _line(known, figures) | {"domain_losses": domain_losses}
            line |= self._speed(tokens / max(seconds, 1e-9))
            line |= {"data_wait": waited, "seconds": seconds, "max_memory": memory}
            self._write_line(line)
            self.totals.add(line, tokens=tokens)
            self.display.show(line)
        in_row = max(int(figures["skipped_in_row"]) for figures in values)
        self._unread.clear()
        self._unread_domains.clear()
        self._restart_clock()
        if in_row >= self.task.schedule.max_skipped_steps:
            self._stop_non_finite(in_row)

    def mixture_is_due(self) -> bool:
        """Whether domain weights are updated after this step; not so late that the stage would not use them."""
        schedule = self.task.schedule
        return self.step % schedule.mixture_interval == 0 and self.step + PREFETCHED_STEPS < schedule.total_steps

    def measure(self, name: str) -> dict[str, float]:
        """Held-out loss of each domain now, in nats, under the masks without noise."""
        heldout, engine = self.task.heldout, self.task.engine
        if self.task.masking is not None:
            self.task.masking.model.set_masks(self.task.masking.learner.final_masks())

        def forward(tokens_BT: Tensor, documents: Documents | None) -> Tensor:
            with torch.no_grad(), engine.autocast():
                losses: Losses = self.model(tokens_BT, documents)
            return losses.total

        self.model.eval()
        with self.display.activity(name, total=heldout.tokens) as advance:
            losses = heldout.measure(forward, advance)
        self.model.train()
        return losses

    def update_mixture(self, dynamic: DynamicMixture) -> None:
        """Announce new domain weights from the losses that the rule goes by."""
        self.report()
        started = time.monotonic()
        losses = self.measure("held-out losses") if self.averages is None else self.averages.losses
        masking, schedule = self.task.masking, self.task.schedule
        # On one process: whatever its arithmetic, all of them go on with the same weights.
        update = self.task.processes.on_main(
            lambda: dynamic.update(
                self.prefetcher.weights,
                losses=losses,
                parameters=dynamic.parameters if masking is None else masking.learner.expected_parameters(),
                tokens=self.step * schedule.sequences_per_step * self.task.mixture.sequence_length,
                state=self.mixture_rule,
            )
        )
        self.mixture_rule = update.state
        first_sample = self.prefetcher.update_weights(update.weights)
        seconds = time.monotonic() - started
        line = {
            "step": self.step,
            "event": "mixture",
            "losses": losses,
            "losses_from": "heldout" if self.averages is None else "training",
            "reference": update.reference,
            "weights": update.weights,
            "first_sample": first_sample,
            "seconds": seconds,
        }
        self._write_line(line)
        self.display.show(line)
        self.totals.heldout_seconds += seconds
        self._restart_clock()

    def save(self) -> None:
        """Write a checkpoint of the steps done."""
        self.report()
        masking = self.task.masking
        state = {
            "step": self.step,
            "skipped": int(self.skipped),
            "skipped_in_row": int(self.skipped_in_row),
            "metrics_bytes": 0 if self.log is None else self.log.sync(),
            "mixture": self.prefetcher.state_dict(),
            "mixture_rule": self.mixture_rule,
            "masks": None if masking is None else masking.learner.state_dict(),
            "averages": None if self.averages is None else self.averages.state_dict(),
            "random": random_states(),
        }
        self.checkpoints.save(step=self.step, write=partial(self._write, state=state))
        self._restart_clock()

    def newest(self) -> Path:
        """Folder of the checkpoint of the steps done."""
        return self.checkpoints.place(self.step)

    def _write(self, folder: Path, *, state: dict[str, Any]) -> Fingerprints:
        marks = self.task.engine.save(folder)
        if self.task.processes.is_main:
            write_state(folder, "state", state)
        return marks

    def _write_line(self, line: Mapping[str, Any]) -> None:
        if self.log is not None:
            self.log.write(line)
            self.trackers.log(line)

    def _speed(self, tokens_per_second: float) -> dict[str, float | None]:
        """Of all processes, of one, and as a share of the hardware's peak."""
        each = tokens_per_second / self.task.processes.size
        compute = self.task.compute
        mfu = None if compute.peak_flops is None else each * compute.flops_per_token / compute.peak_flops
        return {"tokens_per_second": tokens_per_second, "tokens_per_second_per_gpu": each, "mfu": mfu}

    def _sum_losses(self) -> None:
        """Turn each process's share of the losses not yet read into the step's loss and the largest of a process."""
        steps = [figures for _, figures in self._unread]
        shares_PN = self.task.processes.all_gather(torch.stack([figures["loss"] for figures in steps]))
        for figures, total, largest in zip(steps, shares_PN.sum(0), shares_PN.amax(0), strict=True):
            figures["loss"] = total
            figures["loss_max"] = largest * self.task.processes.size

    def _read_domains(self) -> list[dict[str, float]]:
        """Mean loss of each domain that a step had text of, in nats; of the steps not yet read, over all processes."""
        of_processes = self.task.processes.all_gather(torch.stack(self._unread_domains))
        domains = self.task.mixture.domains
        return [
            {domain: total / count for domain, (total, count) in zip(domains, step, strict=True) if count}
            for step in of_processes.sum(0).tolist()
        ]

    def _stop_non_finite(self, in_row: int) -> None:
        # Skipped steps changed nothing, so this is the last good state; continuing goes on behind the bad samples.
        self.skipped_in_row = torch.zeros_like(self.skipped_in_row)
        self.save()
        raise ShearingError(
            f"{self.task.name} (loss or gradient, step {self.step})",
            value=f"not finite in {in_row} steps in a row",
            allowed=f"fewer than training.max_skipped_steps = {self.task.schedule.max_skipped_steps}",
            mend="the same command tries the steps that follow, from the last good weights "
            f"({self.checkpoints.folder}); if it stops again, start a new run_dir with a lower learning rate or fp32",
        )

    def _restart_clock(self) -> None:
        self._mark = time.monotonic()
        self._wait_mark = self.prefetcher.wait_seconds


class _StopRequest:
    """Turns the first SIGTERM, SIGINT or SIGUSR1 into a request to stop after the step; the second acts at once."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _request(self, number: int, _frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _read(figures: list[dict[str, Tensor]], *, device: torch.device) -> list[dict[str, float]]:
    """Values of scalar tensors, one dict per step; what is on the device comes over in one transfer."""
    flat = [value for step in figures for value in step.values()]
    on_device = [value.to(torch.float64) for value in flat if value.device.type == device.type]
    read = iter(torch.stack(on_device).tolist())
    values = iter([next(read) if value.device.type == device.type else float(value) for value in flat])
    return [{name: next(values) for name in step} for step in figures]


def _line(known: Mapping[str, Any], figures: Mapping[str, float]) -> dict[str, Any]:
    """One step's line of metrics.jsonl; `expected/hidden` of the learner's figures becomes `expected: {hidden: …}`."""
    line: dict[str, Any] = {
        "step": known["step"],
        "tokens": known["tokens"],
        "loss": figures["loss"],
        "loss_max": figures["loss_max"],
        "grad_norm": figures["grad_norm"],
        "learning_rate": known["learning_rate"],
        "skipped": int(figures["skipped"]),
        "weights": known["weights"],
        "expected": {},
        "target": {},
        "violation": {},
        "lambda_1": {},
        "lambda_2": {},
    }
    for name, value in figures.items():
        kind, _, granularity = name.partition("/")
        if granularity:
            line[kind][granularity] = value
    return line
