"""Mixture updates: domain weights that follow held-out losses, or training losses."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from shearing.data.mixture.averages import LossAverages, LossMeans
from shearing.data.mixture.dynamic import DynamicMixture, State
from shearing.training.callbacks.heldout_at_end import measure_held_out
from shearing.training.stage import PREFETCHED_STEPS
from shearing.training.task import Callback, Run, StepResult, Task


class MixtureUpdates(Callback):
    """Announces new domain weights when they are due; keeps what the rule remembers, and the averages."""

    def __init__(self, task: Task) -> None:
        self.rule: State = {} if task.dynamic is None else task.dynamic.state
        self._dynamic = task.dynamic
        self._averages = None if task.average_weight is None else LossAverages(weight=task.average_weight)
        self._beside_teacher = LossMeans() if task.teacher_reference else None

    @override
    def log(self, run: Run, line: Mapping[str, Any]) -> None:
        """Take a step's losses into the averages."""
        if "event" in line:
            return
        if self._averages is not None:
            self._averages.add(line["domain_losses"])
        if self._beside_teacher is not None:
            self._beside_teacher.add(
                line["domain_losses"], reference=line["domain_teacher_losses"], labels=line["domain_tokens"]
            )

    @override
    def after_step(self, run: Run, result: StepResult) -> None:
        """Update if it is due, and not so late that the stage would not use the weights; a longer one would."""
        schedule = run.task.schedule
        due = self._dynamic is not None and run.step % schedule.mixture_interval == 0
        self.left_out = due and run.step + PREFETCHED_STEPS >= schedule.total_steps
        if self._dynamic is not None and due and not self.left_out:
            self._update(run, self._dynamic)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers, and the averages."""
        return {
            "mixture_rule": self.rule,
            "averages": None if (kept := self._averages or self._beside_teacher) is None else kept.state_dict(),
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        # A checkpoint of a version whose rules remembered nothing has no such entry.
        self.rule = state.get("mixture_rule", self.rule)
        if self._averages is not None:
            self._averages.load_state_dict(state["averages"])
        if self._beside_teacher is not None:
            self._beside_teacher.load_state_dict(state["averages"])

    @property
    def _measures(self) -> bool:
        """Whether updates go by held-out losses."""
        return self._averages is None and self._beside_teacher is None

    def _update(self, run: Run, dynamic: DynamicMixture) -> None:
        run.report()
        started = time.monotonic()
        reference = None
        if self._beside_teacher is not None:
            losses, reference = self._beside_teacher.losses, self._beside_teacher.reference
            self._beside_teacher.clear()
        elif self._averages is not None:
            losses = self._averages.losses
        else:
            losses = measure_held_out(run, run.task.heldout, name="held-out losses")
        parameters = self._parameters(run, dynamic)
        # On one process: whatever its arithmetic, all of them go on with the same weights.
        update = run.task.processes.on_main(
            lambda: dynamic.update(
                run.prefetcher.weights,
                losses=losses,
                reference=reference,
                parameters=parameters,
                tokens=run.tokens,
                state=self.rule,
            )
        )
        self.rule = update.state
        first_sample = run.prefetcher.update_weights(update.weights)
        run.log(
            {
                "step": run.step,
                "event": "mixture",
                "losses": losses,
                "losses_from": "heldout" if self._measures else "training",
                "reference": update.reference,
                "weights": update.weights,
                "first_sample": first_sample,
                "seconds": time.monotonic() - started,
            }
        )

    def _parameters(self, run: Run, dynamic: DynamicMixture) -> float:
        """Size of the model whose losses an update goes by: as measured, or while it was trained."""
        masking = run.task.masking
        if masking is None:
            return dynamic.parameters
        of = masking.settled_parameters if self._measures else masking.expected_parameters
        return of(step=run.step)
