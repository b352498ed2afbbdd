"""Stop requests: the first SIGTERM, SIGINT or SIGUSR1 ends the run after the step; the second acts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from typing_extensions import override

from shearing.training.task import Callback, Run, StepResult


class StopRequests(Callback):
    """Listens to signals, and agrees with the other processes on them; a process alone need not ask.

    Attributes:
        requested: the signal that asked this process to stop; None: none did.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @override
    def open(self) -> None:
        """Listen from now on."""
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._request)

    @override
    def after_step(self, run: Run, result: StepResult) -> None:
        """Before checkpoints: the step's is written if the run stops."""
        self._decide_alone(run)

    @override
    def after_save(self, run: Run, folder: Path) -> None:
        """Of what was asked for while the checkpoint was written."""
        self._decide_alone(run)

    @override
    def tell(self) -> str | None:
        """The signal that came here."""
        return self.requested

    @override
    def hear(self, run: Run, told: Sequence[str | None]) -> None:
        """The run stops, whichever process it was."""
        run.stopping = run.stopping or next((name for name in told if name), None)

    @override
    def close(self) -> None:
        """Hand signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _decide_alone(self, run: Run) -> None:
        if run.task.processes.size == 1:
            self.hear(run, [self.requested])

    def _request(self, number: int, _frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self.close()
