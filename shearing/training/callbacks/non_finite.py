"""Non-finite steps: too many of them in a row end the run, at its last good state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NoReturn

from typing_extensions import override

from shearing.errors import ShearingError, key
from shearing.training.task import Callback, Run, StepResult


class NonFiniteGuard(Callback):
    """Counts steps that were skipped in a row.

    Args:
        most: that many end the run.
        save: writes a checkpoint first.
    """

    acts_on_stop: ClassVar[bool] = True

    def __init__(self, *, most: int, save: Callable[[Run], None]) -> None:
        self._most, self._save = most, save
        self._skipped = self._in_row = self._longest = 0
        self._too_many: int | None = None

    @override
    def log(self, run: Run, line: Mapping[str, Any]) -> None:
        """Count a step."""
        if "event" in line:
            return
        self._in_row = self._in_row + 1 if line["skipped"] > self._skipped else 0
        self._longest = max(self._longest, self._in_row)
        self._skipped = line["skipped"]

    @override
    def report(self, run: Run) -> None:
        """Find out whether it is time to end the run, which waits until all others have been told of the step."""
        in_row, self._longest = self._longest, 0
        if in_row >= self._most:
            self._too_many = in_row

    @override
    def after_step(self, run: Run, result: StepResult) -> None:
        """End the run if it is time to.

        Raises:
            ShearingError: too many steps in a row were not finite; a checkpoint is written first.
        """
        if not run.ends:  # there the last checkpoint comes first, with what it reads
            self._end(run)

    @override
    def end(self, run: Run) -> None:
        """As behind a step; the last checkpoint is written."""
        self._end(run)

    def _end(self, run: Run) -> None:
        if self._too_many is None:
            return
        in_row, self._too_many = self._too_many, None
        # Skipped steps changed nothing, so this is the last good state; continuing goes on behind the bad samples.
        self._in_row = 0
        if not run.ends:
            self._save(run)
        follows = "ends the stage" if run.ends else "tries the steps that follow"
        error = ShearingError(
            f"{run.task.name} (loss or gradient, step {run.step})",
            value=f"not finite in {in_row} steps in a row",
            allowed=f"fewer than {key('max_skipped_steps')} = {self._most}",
            mend=f"the same command {follows}, from the last good weights ({run.task.checkpoints}); if it stops again, "
            f"start a new {key('folder')} with a lower learning rate or fp32",
        )
        run.task.processes.on_main(partial(_raise, error))  # all know, one says it

    @override
    def state_dict(self) -> dict[str, Any]:
        """Steps skipped in a row."""
        return {"skipped_in_row": self._in_row}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._skipped, self._in_row = state["skipped"], state["skipped_in_row"]


def _raise(error: ShearingError) -> NoReturn:
    raise error
