"""Each domain's training loss, averaged over steps: what updates domain weights without held-out passes."""

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


class LossMeans:
    """Means over all tokens of each domain since the beginning, that of a model and that of its reference beside it.

    As both losses are of the same tokens, what is hard in them cancels in the difference.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    @property
    def losses(self) -> dict[str, float]:
        """The model's, in nats; domains that were not seen are absent."""
        return {domain: loss / labels for domain, (loss, _, labels) in self._sums.items()}

    @property
    def reference(self) -> dict[str, float]:
        """Its reference's."""
        return {domain: reference / labels for domain, (_, reference, labels) in self._sums.items()}

    def add(self, losses: Mapping[str, float], *, reference: Mapping[str, float], labels: Mapping[str, float]) -> None:
        """One step's means, and the number of labels that they are over; what is not finite is left out."""
        for domain, count in labels.items():
            step = [losses[domain] * count, reference[domain] * count, count]
            if all(map(math.isfinite, step)):
                before = self._sums.get(domain, [0.0, 0.0, 0.0])
                self._sums[domain] = [total + value for total, value in zip(before, step, strict=True)]

    def clear(self) -> None:
        """Begin anew."""
        self._sums = {}

    def state_dict(self) -> dict[str, list[float]]:
        """What a checkpoint keeps."""
        return {domain: list(sums) for domain, sums in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Continue where `state_dict` was taken."""
        self._sums = {domain: list(sums) for domain, sums in state.items()}
