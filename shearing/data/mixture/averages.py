"""Each domain's training loss as a moving average: what updates domain weights without held-out passes."""

from __future__ import annotations

import math
from collections.abc import Mapping


class LossAverages:
    """Exponential moving averages e <- (1 - a) e + a l of domains' losses l, from the first loss on.

    A domain that a step has no text of keeps its average. The averages depend on the losses and their order alone, so
    they are the same on all processes and, with the state in a checkpoint, after a resume.

    Args:
        weight: a, that of a new loss; above 0, at most 1.
    """

    def __init__(self, *, weight: float) -> None:
        self._weight = weight
        self._losses: dict[str, float] = {}

    @property
    def losses(self) -> dict[str, float]:
        """The averages, in nats; domains that were never seen are absent."""
        return dict(self._losses)

    def add(self, losses: Mapping[str, float]) -> None:
        """One step's mean loss of the domains that it had text of; what is not finite is left out."""
        for domain, loss in losses.items():
            if math.isfinite(loss):
                average = self._losses.get(domain, loss)
                self._losses[domain] = average + self._weight * (loss - average)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return self.losses

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue where `state_dict` was taken."""
        self._losses = dict(state)
