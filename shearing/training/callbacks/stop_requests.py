"""Stop requests: the first SIGTERM, SIGINT or SIGUSR1 ends the run after the step, or what is measured behind it.

The second acts at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, ClassVar

from typing_extensions import override

from shearing.processes.processes import Processes, Question
from shearing.processes.stop import StopAsked
from shearing.training.task import Callback, Run, StepResult


class StopRequests(Callback):
    """Listens to signals, and agrees with the other processes on them at every step.

    Attributes:
        requested: the signal that asked this process to stop; None: none did.

    Args:
        processes: those of the run.
    """

    acts_on_stop: ClassVar[bool] = True

    def __init__(self, processes: Processes) -> None:
        self.requested: str | None = None
        self._question = Question(processes)
        self._previous: dict[signal.Signals, Any] = {}

    @override
    def open(self) -> None:
        """Listen from now on."""
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._request)

    @override
    def after_step(self, run: Run, result: StepResult) -> None:
        """Before checkpoints: the step's is written if the run stops; several stop a step after the signal."""
        if run.ends:
            self._question.answer()  # see `after_last_step`; nothing may be left under way
            return
        number = self._ask()
        if number and run.stopping is None:
            run.stopping = signal.Signals(number).name
        if run.stopping:
            self._question.answer()

    def after_last_step(self) -> str | None:
        """The signal that came too late for any step to hear of it, once the last one is saved; all processes call it.

        What stays to be done, such as writing the model, is begun again by the same command.
        """
        number = max(self._ask(), self._question.answer())
        return signal.Signals(number).name if number else None

    def heed(self) -> None:
        """Between two batches of a measurement; all processes call it equally often, and hear a batch later.

        Raises:
            StopAsked: one of them was asked to stop.
        """
        if number := self._ask():
            self._question.answer()
            raise StopAsked(number)

    @override
    def close(self) -> None:
        """Hand signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self) -> int:
        return self._question.ask(0 if self.requested is None else int(signal.Signals[self.requested]))

    def _request(self, number: int, _frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self.close()
