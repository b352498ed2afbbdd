"""Axes of parameters: which units lie on each, and how many; what counting, masking and cutting are derived from.

An axis is made of segments, so that matrices that a family has fused can be declared: the rows of a `qkv_proj` are the
query heads, then the KV groups' keys, then their values; those of a `gate_up_proj` the intermediate units twice.

Legend: d hidden, m intermediate, H query heads, K KV groups, dh head dimension, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Unit = Literal["hidden", "query_heads", "kv_groups", "intermediate", "experts", "head", "vocabulary"]
"""What an entry of an axis belongs to: d, H * dh, K * dh, m, E, dh and V entries; nothing cuts the last two."""

When = Callable[[Any], bool]
"""Whether a config of the family has a parameter."""


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter.

    Attributes:
        segments: what lies on it, first to last.
        by_group: the segments take turns, KV group by KV group, each with its group's share: what is fused by head.
    """

    segments: tuple[Unit, ...]
    by_group: bool = False

    def size(self, sizes: Mapping[Unit, Any]) -> Any:
        """Number of entries, of the type of `sizes`, which has every unit's number of entries."""
        return sum(sizes[unit] for unit in self.segments)

    def places(self, sizes: Mapping[Unit, int]) -> list[tuple[Unit, Tensor]]:
        """For each segment its unit, and where on the axis its entries are: int64 [sizes[unit]]."""
        groups = sizes["kv_groups"] // sizes["head"] if self.by_group else 1
        shares = [sizes[unit] // groups for unit in self.segments]
        found, offset = [], 0
        for unit, share in zip(self.segments, shares, strict=True):
            starts = offset + sum(shares) * torch.arange(groups)
            found.append((unit, (starts[:, None] + torch.arange(share)).flatten()))
            offset += share
        return found

    def kept(self, units: Mapping[Unit, Tensor], *, sizes: Mapping[Unit, int]) -> Tensor | None:
        """Where on the axis the entries are that stay, ascending.

        Args:
            units: unit -> which of its entries stay, ascending; of a unit that is absent all do.
            sizes: unit -> number of its entries.

        Returns:
            int64, or None if all entries stay.
        """
        if not set(self.segments) & units.keys():
            return None
        if len(self.segments) == 1:
            return units[self.segments[0]]
        stays = [where[units[unit].cpu()] if unit in units else where for unit, where in self.places(sizes)]
        return torch.cat(stays).sort().values


HIDDEN = Axis(("hidden",))
QUERY_HEADS = Axis(("query_heads",))
KV_GROUPS = Axis(("kv_groups",))
INTERMEDIATE = Axis(("intermediate",))
EXPERTS = Axis(("experts",))
HEAD = Axis(("head",))
VOCABULARY = Axis(("vocabulary",))

Axes = tuple[Axis, ...]


def always(_config: Any) -> bool:
    """Every config of the family has it."""
    return True


def never(_config: Any) -> bool:
    """No config of the family has it."""
    return False


def flag(name: str) -> When:
    """The configs have it whose attribute `name` is true."""

    def when(config: Any) -> bool:
        return bool(getattr(config, name, False))

    return when


@dataclass(frozen=True)
class Parameter:
    """A parameter of a family.

    Attributes:
        name: in the layer's state dict, or in the model's for one outside the layers.
        axes: what lies on each of its axes.
        when: which configs have it.
    """

    name: str
    axes: Axes
    when: When = always

    def size(self, sizes: Mapping[Unit, Any]) -> Any:
        """Number of entries: the product over its axes."""
        product = self.axes[0].size(sizes)
        for axis in self.axes[1:]:
            product = product * axis.size(sizes)
        return product


def linear(name: str, rows: Axis, columns: Axis, *, bias: When = never) -> tuple[Parameter, Parameter]:
    """Weight [rows, columns] and bias [rows] of a linear layer that reads `columns` and puts out `rows`."""
    return Parameter(f"{name}.weight", (rows, columns)), Parameter(f"{name}.bias", (rows,), when=bias)


def count(parameters: Iterable[Parameter], sizes: Mapping[Unit, Any]) -> Any:
    """Number of entries of all `parameters`.

    Args:
        parameters: of a layer, or of what is outside the layers.
        sizes: unit -> number of its entries: integers, or tensors that broadcast, which may be expected numbers of
            units and are differentiated through.
    """
    return sum(parameter.size(sizes) for parameter in parameters)
