"""Non-finite steps: too many of them in a row end the run, at its last good state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import override

from shearing.errors import ShearingError, key
from shearing.training.task import Callback, Run


class NonFiniteGuard(Callback):
    """Counts steps that were skipped in a row.

    Args:
        most: that many end the run.
        save: writes a checkpoint first.
    """

    def __init__(self, *, most: int, save: Callable[[Run], None]) -> None:
        self._most, self._save = most, save
        self._skipped = self._in_row = self._longest = 0

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
        """End the run if it is time to.

        Raises:
            ShearingError: too many steps in a row were not finite; a checkpoint is written first.
        """
        in_row, self._longest = self._longest, 0
        if in_row < self._most:
            return
        # Skipped steps changed nothing, so this is the last good state; continuing goes on behind the bad samples.
        self._in_row = 0
        self._save(run)
        raise ShearingError(
            f"{run.task.name} (loss or gradient, step {run.step})",
            value=f"not finite in {in_row} steps in a row",
            allowed=f"fewer than {key('max_skipped_steps')} = {self._most}",
            mend="the same command tries the steps that follow, from the last good weights "
            f"({run.task.checkpoints}); if it stops again, start a new {key('folder')} with a lower learning rate or "
            "fp32",
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Steps skipped in a row."""
        return {"skipped_in_row": self._in_row}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._skipped, self._in_row = state["skipped"], state["skipped_in_row"]
