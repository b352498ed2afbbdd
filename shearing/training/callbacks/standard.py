"""The callbacks that every stage has, in their order: report before mixture update before save."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import Self

from shearing.training.callbacks.heldout_at_end import HeldOutAtEnd, Validation
from shearing.training.callbacks.metrics import Metrics
from shearing.training.callbacks.mixture_updates import MixtureUpdates
from shearing.training.callbacks.non_finite import NonFiniteGuard
from shearing.training.callbacks.objective_steps import ObjectiveSteps
from shearing.training.callbacks.save_checkpoints import SaveCheckpoints
from shearing.training.callbacks.stop_requests import StopRequests
from shearing.training.stage import Trained
from shearing.training.task import Callback, Task


@dataclass(frozen=True, kw_only=True)
class StandardCallbacks:
    """Those of one run of a stage."""

    objective: ObjectiveSteps
    metrics: Metrics
    mixture: MixtureUpdates
    validation: Validation
    held_out: HeldOutAtEnd
    stop: StopRequests
    non_finite: NonFiniteGuard
    checkpoints: SaveCheckpoints

    @classmethod
    def of(cls, task: Task, *, measure_end: bool) -> Self:
        """Those of a task; `measure_end`: measure held-out losses after the last step."""
        checkpoints = SaveCheckpoints(task)
        return cls(
            objective=ObjectiveSteps(task),
            metrics=Metrics(task),
            mixture=MixtureUpdates(task),
            validation=Validation(task.validation, ends=not measure_end),
            held_out=HeldOutAtEnd(wanted=measure_end),
            stop=StopRequests(task.processes),
            non_finite=NonFiniteGuard(most=task.schedule.max_skipped_steps, save=checkpoints.save),
            checkpoints=checkpoints,
        )

    def around(self, others: tuple[Callback, ...]) -> tuple[Callback, ...]:
        """All callbacks of a run in their order, a task's own among them."""
        return (
            self.objective,
            self.metrics,
            self.mixture,
            self.validation,
            self.held_out,
            *others,
            self.stop,
            self.non_finite,
            self.checkpoints,
        )

    def trained(self) -> Trained:
        """What the run leaves, once it has ended."""
        return Trained(
            totals=self.metrics.totals,
            checkpoint=self.checkpoints.last(),
            heldout=self.held_out.losses,
            mixture_rule=self.mixture.rule,
        )
