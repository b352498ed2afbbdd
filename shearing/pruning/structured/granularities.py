"""What may be pruned, on which rows it is counted, and how much of it the target keeps.

A row is the last axis of a granularity's `log_alpha`: all of the residual stream for `hidden`, all layers for
`layers`, the units of one layer for `kv_groups`, `intermediate` and `experts`, the heads of one group for
`query_heads`; where there are experts, the units of one expert for `intermediate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from shearing.errors import ShearingError, key
from shearing.models.masked import Masks
from shearing.models.shape import Shape

SIZE_OF = {
    "layers": "num_hidden_layers",
    "attention": "num_hidden_layers",
    "mlp": "num_hidden_layers",
    "kv_groups": "num_key_value_heads",
    "query_heads": "query_heads_per_group",
    "experts": "num_experts",
    "intermediate": "intermediate_size",
    "hidden": "hidden_size",
}
"""Granularity -> the size of a `Shape` that it prunes."""

PRUNED_BY = {
    "num_hidden_layers": ("layers", "sublayers"),
    "hidden_size": ("hidden",),
    "intermediate_size": ("intermediate",),
    "num_experts": ("experts",),
    "num_key_value_heads": ("kv_groups",),
    "query_heads_per_group": ("query_heads",),
}
"""Size of a `Shape` -> names in a recipe, one of which shrinks it; `sublayers` are `attention` and `mlp`."""


@dataclass(frozen=True)
class Granularity:
    """One kind of unit.

    Attributes:
        name: key in `SIZE_OF`.
        size: shape of `log_alpha`.
        target: units to keep in every row; None when only the number of parameters is constrained.
        least: units that a row has to keep.
    """

    name: str
    size: tuple[int, ...]
    target: int | None
    least: int = 1

    @property
    def units(self) -> int:
        """Units in a row."""
        return self.size[-1]


def unit_sizes(source: Shape) -> dict[str, tuple[int, ...]]:
    """Granularity -> the shape of its `log_alpha`, its scores and its masks."""
    L, K, G = source.num_hidden_layers, source.num_key_value_heads, source.query_heads_per_group
    of_mlp = (L, source.num_experts) if source.num_experts else (L,)
    return {
        "layers": (L,),
        "attention": (L,),
        "mlp": (L,),
        "kv_groups": (L, K),
        "query_heads": (L, K, G),
        **({"experts": of_mlp} if source.num_experts else {}),
        "intermediate": (*of_mlp, source.intermediate_size),
        "hidden": (source.hidden_size,),
    }


def smallest_shape(names: Sequence[str], *, source: Shape) -> Shape:
    """One unit left of everything that may be pruned; of experts those that a token is computed by.

    Args:
        names: of granularities, as in a recipe.
        source: sizes of the source model.
    """

    def left(size: str) -> int:
        return 1 if set(PRUNED_BY[size]) & set(names) else getattr(source, size)

    groups = left("num_key_value_heads")
    return dataclasses.replace(
        source,
        num_hidden_layers=left("num_hidden_layers"),
        hidden_size=left("hidden_size"),
        intermediate_size=left("intermediate_size"),
        num_key_value_heads=groups,
        num_attention_heads=groups * left("query_heads_per_group"),
        num_experts=max(left("num_experts"), source.num_experts_per_tok) if source.num_experts else 0,
    )


def granularities_of(names: Sequence[str], *, source: Shape, target: Shape | None) -> tuple[Granularity, ...]:
    """The granularities that have something to prune.

    Args:
        names: as in a recipe; `sublayers` stands for `attention` and `mlp`.
        source: sizes of the source model.
        target: sizes to reach; None for a parameter budget, where every named granularity takes part.

    Raises:
        ShearingError: a size has to shrink and no granularity that is named can shrink it; see also
            `require_granularities`.
    """
    require_granularities(names, source=source)
    sizes = unit_sizes(source)
    expanded = [part for name in names for part in (("attention", "mlp") if name == "sublayers" else (name,))]
    if target is None:
        least = {"experts": source.num_experts_per_tok}
        return tuple(
            Granularity(name, sizes[name], None, least.get(name, 1)) for name in expanded if sizes[name][-1] > 1
        )
    found = []
    for name in expanded:
        keep = getattr(target, SIZE_OF[name])
        if keep < sizes[name][-1]:
            found.append(Granularity(name, sizes[name], keep))
    for name, size in SIZE_OF.items():
        alternatives = {"layers": "attention", "attention": "layers", "mlp": "layers"}
        shrinks = getattr(target, size) < getattr(source, size)
        if shrinks and name not in expanded and alternatives.get(name) not in expanded:
            named = "layers' or 'sublayers" if name in alternatives else name
            raise ShearingError(
                "granularities",
                value=list(names),
                allowed=f"a list with '{named}', as the target shrinks {size} "
                f"from {getattr(source, size)} to {getattr(target, size)}",
                mend=f"add '{named}' to {key('granularities')}, or leave target sizes of this kind as in the source",
            )
    return tuple(found)


def require_granularities(names: Sequence[str], *, source: Shape) -> None:
    """Check that the family of a model has the granularities that are named.

    Raises:
        ShearingError: experts of a model that has none; sub-layers alone, where attention and MLP of a layer read the
            same residual stream.
    """
    if "experts" in names and not source.num_experts:
        others = [name for name in names if name != "experts"]
        raise ShearingError(
            "granularities",
            value=list(names),
            allowed=f"without 'experts': the MLPs of this {source.family.model_type!r} are not made of experts",
            mend=f"set {key('granularities')}=[{', '.join(others)}]" if others else "name what the target shrinks",
        )
    if "sublayers" in names and source.family.parallel:
        others = [name for name in names if name != "sublayers"]
        raise ShearingError(
            "granularities",
            value=list(names),
            allowed=f"without 'sublayers': in this {source.family.model_type!r} attention and MLP of a layer read the "
            "same residual stream, and no ordinary config has one of them alone",
            mend=f"name 'layers' in its place: set {key('granularities')}=[{', '.join(['layers', *others])}]",
        )


def as_masks(z: Mapping[str, Tensor]) -> Masks:
    """Mask values by granularity as the masked model takes them."""
    layers = z.get("layers")
    return Masks(
        hidden=z.get("hidden"),
        attention=z.get("attention", layers),
        mlp=z.get("mlp", layers),
        kv_groups=z.get("kv_groups"),
        query_heads=z.get("query_heads"),
        intermediate=z.get("intermediate"),
        experts=z.get("experts"),
    )
