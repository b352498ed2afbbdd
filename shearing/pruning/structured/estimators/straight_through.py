"""Straight-through masks under the hard budget: every row adds up to its target at every step, without noise.

What a unit's mask is depends on its rank in the row (`by_rank`): 1 well above the cut, 0 well below it. In the band
that is in doubt all units are equally there at first, and then the more the better their rank, until nothing is between
0 and 1 at the freeze: what is trained becomes what is measured. Partly there is where units can be compared: the
gradient of a unit that is all there says little of what it would cost to lose it, that of one that is gone as little of
what it would bring, and both depend on who else is there; on the way, it is the difference between the two.

The backward pass takes a unit's mask for its score (straight-through estimator, Bengio et al., arXiv 1308.3432), so
every unit has a gradient, closed ones too. None have an expert that is closed, as no token is sent there, and what lies
inside a unit that is closed. No rate has to fit the length of a row, the number of steps or the scale of a gradient,
because scores are not moved but weighed: the order in which the row started against the order that the steps so far
have seen, each as much as it is worth. What the steps are worth is measured (`reliability`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from shearing.pruning.structured.constraint import Constraint
from shearing.pruning.structured.estimators.estimator import Estimator
from shearing.pruning.structured.mask_settings import MaskSettings
from shearing.pruning.structured.starts import band


class StraightThrough(Estimator):
    """The best of every row, by its start and the gradients so far."""

    @override
    def __init__(
        self,
        log_alpha: Mapping[str, nn.Parameter],
        *,
        constraint: Constraint,
        settings: MaskSettings,
        places: Callable[[int], dict[str, Tensor]],
    ) -> None:
        super().__init__(log_alpha, constraint=constraint, settings=settings, places=places)
        self._start = {name: value.detach().clone() for name, value in log_alpha.items()}
        self._votes = {name: torch.zeros_like(value) for name, value in self._start.items()}
        self._squares = {name: torch.zeros_like(value) for name, value in self._start.items()}
        self._steps = torch.zeros((), device=next(iter(self._start.values())).device if self._start else None)

    @override
    def masks(self, *, step: int, draw: int) -> dict[str, Tensor]:
        """Masks without noise, the same for every draw."""
        return {
            name: mask + (self._log_alpha[name] - self._log_alpha[name].detach())
            for name, mask in self.alive(step=step).items()
        }

    @override
    def alive(self, *, step: int) -> dict[str, Tensor]:
        """The masks themselves."""
        progress = min(1.0, step / max(1, self._settings.freeze_step))
        places, found = self._places(step), {}
        for granularity in self._constraint.granularities_at(step=step):
            assert granularity.target is not None
            doubtful = self._settings.units_in_doubt(granularity.units)
            profile = by_rank(granularity.units, keep=granularity.target, doubtful=doubtful, progress=progress)
            rank = places[granularity.name] + granularity.target
            values = torch.tensor(profile, dtype=torch.float32)
            values = values.pin_memory().to(rank.device, non_blocking=True) if rank.is_cuda else values
            found[granularity.name] = values[rank.long()]
        return found

    @override
    def is_open(self, *, step: int) -> dict[str, Tensor]:
        """All that would stay if the masks were binary now: there is nothing to round."""
        return {name: place < 0 for name, place in self._places(step).items()}

    @override
    def penalty(self, *, step: int) -> Tensor:
        """None: no size is ever off its target."""
        return next(iter(self._log_alpha.values())).new_zeros(())

    @override
    @torch.no_grad()
    def update(self, *, step: int, skip: Tensor | None) -> None:
        """See `Estimator.update`; a step is one vote on the order of every row, whatever the scale of its gradient."""
        counts = torch.ones_like(self._steps) if skip is None else (skip == 0).to(self._steps)
        self._steps += counts
        shares = self._constraint.final_shares
        for name, value in self._log_alpha.items():
            if value.grad is None:
                continue
            # Not times `counts`: what is not finite times zero is not finite.
            vote = torch.where(counts > 0, centred_ranks(-value.grad), 0.0)
            self._votes[name] += vote
            self._squares[name] += vote.square()
            worth = reliability(self._votes[name], self._squares[name], steps=self._steps)
            seen = band(self._votes[name], share=shares[name], settings=self._settings)
            value.copy_(torch.lerp(self._start[name], seen, worth))
            value.grad = None

    @override
    def metrics(self) -> dict[str, Tensor]:
        """What the steps so far are worth against the start."""
        return {
            f"reliability/{name}": reliability(votes, self._squares[name], steps=self._steps)
            for name, votes in self._votes.items()
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        """The start, the votes and their number."""
        return {"start": self._start, "votes": self._votes, "squares": self._squares, "steps": self._steps}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Estimator.load_state_dict`."""
        for ours, saved in (
            (self._start, state["start"]),
            (self._votes, state["votes"]),
            (self._squares, state["squares"]),
        ):
            for name, value in ours.items():
                value.copy_(saved[name])
        self._steps.copy_(state["steps"])


@lru_cache(maxsize=64)
def by_rank(units: int, *, keep: int, doubtful: int, progress: float) -> tuple[float, ...]:
    """The mask of every rank of a row of `units`, from the best; they add up to `keep`.

    Args:
        units: of the row.
        keep: its target.
        doubtful: ranks around the cut that are in doubt, see `MaskSettings.units_in_doubt`; all where it is `units`.
        progress: 0: those in doubt are equally there; 1: binary. The slope grows as (progress / (1 - progress))².
    """
    top, bottom = max(0, keep - doubtful // 2), min(units, keep + doubtful // 2)
    if doubtful >= units:
        top, bottom = 0, units
    width = bottom - top
    if progress >= 1 or keep in (top, bottom):
        return (1.0,) * keep + (0.0,) * (units - keep)
    slope = 2 * (progress / (1 - progress)) ** 2 / width
    place = torch.arange(width, dtype=torch.float64) * slope
    low, high = 0.0, 1.0 + slope * width
    for _ in range(60):
        level = (low + high) / 2
        low, high = (level, high) if float((level - place).clamp(0, 1).sum()) < keep - top else (low, level)
    return (1.0,) * top + tuple((high - place).clamp(0, 1).tolist()) + (0.0,) * (units - bottom)


def centred_ranks(values: Tensor) -> Tensor:
    """Ranks in each row [..., n], from -1 for the lowest value to 1 for the highest; equal values get their mean rank.

    Which units of a row go is a question of order. Ranks have one scale for every row, layer and step, and a unit with
    a gradient a thousand times larger than all others' (attention sinks have such) counts as the first and no more.
    """
    units = values.shape[-1]
    rows = values.reshape(-1, units).contiguous()
    ordered = rows.sort(-1).values
    below = torch.searchsorted(ordered, rows)
    up_to = torch.searchsorted(ordered, rows, right=True)
    return ((below + up_to).to(values.dtype) - units).view(values.shape) / max(1, units - 1)


def reliability(votes: Tensor, squares: Tensor, *, steps: Tensor) -> Tensor:
    """Share of what the mean votes differ by that is not the chance of these steps: 1 - noise / total, at least 0.

    The shrinkage factor of James and Stein for means of equal noise, which is estimated from how much the votes of one
    unit differ from step to step. Pooled over all rows, as rows may be short.

    Args:
        votes, squares: [..., n] sums over steps of votes with mean 0 in each row, and of their squares.
        steps: scalar, their number.

    Returns:
        A scalar in [0, 1]: 0 after a single step, 1 where every step says the same.
    """
    mean = votes / steps.clamp_min(1)
    total = mean.square().mean()
    noise = (squares / steps.clamp_min(1) - mean.square()).clamp_min(0).mean() / (steps - 1).clamp_min(1)
    share = 1 - noise / total.clamp_min(torch.finfo(total.dtype).tiny)
    return torch.where(steps > 1, share.clamp(0, 1), 0.0)
