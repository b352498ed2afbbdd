"""Tells the objective of steps, and keeps what it learns of the domains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from shearing.training.task import Callback, Run, StepResult, Task


class ObjectiveSteps(Callback):
    """The objective's steps; only one that follows the domains costs an exchange, which stays on the device."""

    def __init__(self, task: Task) -> None:
        self._objective = task.objective

    @override
    def before_step(self, run: Run) -> None:
        """The step's number."""
        self._objective.begin_step(run.step)

    @override
    def after_step(self, run: Run, result: StepResult) -> None:
        """The domains' sums over all processes."""
        if self._objective.follows_domains:
            self._objective.end_step(run.task.processes.sum(result.domains.clone()))

    @override
    def state_dict(self) -> dict[str, Any]:
        """What the objective remembers."""
        return {"objective": self._objective.memory()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        # A checkpoint of a version whose objectives remembered nothing has no such entry.
        self._objective.recall(state.get("objective", {}))
