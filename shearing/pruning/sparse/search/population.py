"""The first candidates: uniform, those that follow sensitivity more or less strongly, other rules', and variations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from shearing.pruning.sparse.search.genome import Genome, Space

TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Steps between levels by which a unit whose sensitivity lies one standard deviation above the mean is denser."""

_ATTEMPTS = 50


def first_population(
    space: Space,
    *,
    sensitivity: Sequence[float],
    starts: Mapping[str, Genome],
    size: int,
    random: np.random.Generator,
) -> dict[Genome, str]:
    """Candidates, different from each other, by where they come from.

    Args:
        space: all candidates.
        sensitivity: of each unit, not negative; what is more sensitive becomes denser.
        starts: candidates that have to be there, by name.
        size: how many in all, at least; fewer where the space has no more.
        random: for the variations.
    """
    found: dict[Genome, str] = {}
    for name, genome in starts.items():
        found.setdefault(genome, name)
    standardised = _standardised_logarithm(sensitivity)
    densities = [float(level.density) for level in space.levels]
    step = (densities[-1] - densities[0]) / max(1, len(densities) - 1)
    for temperature in TEMPERATURES:
        wanted = float(space.budget) + temperature * step * standardised
        found.setdefault(space.closest(wanted.tolist()), f"sensitivity x {temperature:g}")
    origins = list(found.items())
    for attempt in range(_ATTEMPTS * size):
        if len(found) >= size:
            break
        genome, origin = origins[attempt % len(origins)]
        found.setdefault(space.mutate(genome, more=0.5, random=random), origin)
    return found


def _standardised_logarithm(sensitivity: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Traces span orders of magnitude; zeros count as the smallest that is not."""
    values = np.array(sensitivity, dtype=np.float64)
    positive = values[values > 0]
    logarithm = np.log(np.maximum(values, positive.min() if len(positive) else 1.0))
    spread = float(logarithm.std())
    return (logarithm - logarithm.mean()) / spread if spread > 0 else np.zeros_like(logarithm)
