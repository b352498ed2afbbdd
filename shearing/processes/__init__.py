"""The processes of a run: what they do together, and who notices when one is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.processes.processes import AgreedEnd, FailedElsewhere, Processes
    from shearing.processes.stop import StopAsked, StoppedAtOnce
    from shearing.processes.watch import Watch

__all__ = ["AgreedEnd", "FailedElsewhere", "Processes", "StopAsked", "StoppedAtOnce", "Watch"]

__getattr__ = late(
    __name__,
    {
        "AgreedEnd": "processes",
        "FailedElsewhere": "processes",
        "Processes": "processes",
        "StopAsked": "stop",
        "StoppedAtOnce": "stop",
        "Watch": "watch",
    },
)
