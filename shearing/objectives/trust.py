"""Which domains a teacher is worth listening to in: where its own loss on the same tokens is below the student's.

Shapes: M domains.
"""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT = 0.9
"""Share of what was known that is kept in a step: the means are of about the last ten steps."""


class DomainTrust:
    """How far a teacher is trusted in each domain: min(1, max(0, student's loss - teacher's) / margin), in nats.

    Both losses are means over the last steps' tokens, of the same tokens: what is hard in them is hard for both and
    cancels. Everything stays on the device.

    Args:
        num_domains: M.
        margin: nats below the student's loss at which a teacher is trusted wholly.
        device: of the sums.
    """

    def __init__(self, num_domains: int, *, margin: float, device: torch.device) -> None:
        self._margin = margin
        self._sums_M3 = torch.zeros(num_domains, 3, dtype=torch.float64, device=device)

    def factors(self) -> Tensor:
        """[M], between 0 and 1; 1 for a domain that was not seen."""
        student_M, teacher_M, labels_M = self._sums_M3.unbind(1)
        above_M = ((student_M - teacher_M) / labels_M / self._margin).clamp(0.0, 1.0)
        return torch.where(labels_M > 0, above_M, 1.0).float()

    def add(self, student_M: Tensor, *, teacher_M: Tensor, labels_M: Tensor) -> None:
        """A step's sums, in nats, of all processes; a step in which one is not finite says nothing."""
        step_M3 = torch.stack([student_M, teacher_M, labels_M], 1)
        sums_M3 = _KEPT * self._sums_M3 + step_M3
        self._sums_M3 = torch.where(step_M3.isfinite().all(), sums_M3, self._sums_M3)

    def state(self) -> list[list[float]]:
        """The sums; JSON-able."""
        sums: list[list[float]] = self._sums_M3.tolist()
        return sums

    def restore(self, state: list[list[float]]) -> None:
        """Continue where `state` was taken, bit for bit."""
        self._sums_M3 = self._sums_M3.new_tensor(state)
