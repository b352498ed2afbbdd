"""The units that a run's final masks keep; along a cascade those of its first source, through one cut after the other.

Legend: L layers, d hidden, m intermediate, K KV groups, G query heads per group, E experts; primes mark what is left.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file

from shearing.models.cutting import Selection
from shearing.models.masked import Masks
from shearing.models.shape import Shape
from shearing.runs.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What a run has cut.

    Attributes:
        run: whose masks say so.
        source: shape of the model that it was cut from.
        shape: shape of what is left.
    """

    run: RunDirectory
    source: Shape
    shape: Shape

    def selection(self) -> Selection | None:
        """The units that the final masks keep; None where the masks are gone."""
        path = self.run.prune / "masks.safetensors"
        if not path.is_file():
            return None
        return Selection.of(Masks(**load_file(path)), source=self.source, target=self.shape)


def digest_of(cuts: Sequence[Cut]) -> str | None:
    """Hash of the units of the first source that are left after cuts, each of what the one before left.

    Returns:
        See `Selection.digest`; None where the masks of a cut are gone.
    """
    found = [cut.selection() for cut in cuts]
    there = [each for each in found if each is not None]
    return functools.reduce(through, there).digest if found and len(there) == len(found) else None


def through(first: Selection, second: Selection) -> Selection:
    """The units of a source that two cuts leave, the second of what the first has left."""
    layers, groups, heads, units, experts = [], [], [], [], []
    for new, (a, m) in enumerate(second.layers):
        layers.append((first.layers[a][0], first.layers[m][1]))
        of_layer = second.kv_groups[new]  # [K']
        groups.append(first.kv_groups[a][of_layer])
        heads.append(first.query_heads[a][of_layer].gather(1, second.query_heads[new]))  # [K', G']
        inside, kept = first.intermediate[m], second.intermediate[new]
        if first.experts is None or second.experts is None:
            units.append(inside[kept])  # [m']
        else:
            experts.append(first.experts[m][second.experts[new]])  # [E']
            units.append(inside[second.experts[new]].gather(1, kept))  # [E', m']
    return Selection(
        layers=tuple(layers),
        hidden=first.hidden[second.hidden],
        kv_groups=torch.stack(groups),
        query_heads=torch.stack(heads),
        intermediate=torch.stack(units),
        experts=torch.stack(experts) if experts else None,
    )
