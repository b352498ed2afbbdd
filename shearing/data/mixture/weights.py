"""Starting weights of the domains, from what a recipe says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from shearing.errors import ShearingError, key, nearest_name


def resolve_weights(
    weights: Mapping[str, float] | Literal["uniform", "proportional"], *, tokens: Mapping[str, int]
) -> dict[str, float]:
    """Starting weights that sum to 1, from what a recipe says.

    Args:
        weights: one number per domain, or `uniform`, or `proportional` to the training tokens.
        tokens: training tokens of every domain.

    Raises:
        ShearingError: a domain is missing or unknown, a weight is negative or not finite, or all are zero.
    """
    if weights == "uniform":
        return dict.fromkeys(tokens, 1.0 / len(tokens))
    if weights == "proportional":
        return {name: count / sum(tokens.values()) for name, count in tokens.items()}
    field = "initial_weights"
    for name in weights:
        if name not in tokens:
            raise ShearingError(
                field, value=name, allowed=", ".join(tokens), mend=nearest_name(name, tokens) or f"remove {name}"
            )
    for name in tokens:
        if name not in weights:
            raise ShearingError(
                field,
                value=f"nothing for domain {name}",
                allowed=f"a weight for every domain of {key('domains')}",
                mend=f"add `{name}: 0.1`, or leave {name} out of {key('domains')}",
            )
        if not math.isfinite(weights[name]) or weights[name] < 0:
            raise ShearingError(
                f"{key(field)}.{name}", value=weights[name], allowed="a finite number, at least 0", mend="correct it"
            )
    total = sum(weights.values())
    if total <= 0:
        raise ShearingError(field, value=dict(weights), allowed="at least one weight above 0", mend="raise one")
    return {name: weights[name] / total for name in tokens}
