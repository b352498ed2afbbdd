"""Domain weights from losses: the update rules of dynamic batch loading, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from shearing.errors import ShearingError
from shearing.mixture.corpus import nearest_name

Rule = Literal["paper", "released", "bandit", "constant"]


def update_weights(
    rule: Rule,
    *,
    weights: Mapping[str, float],
    losses: Mapping[str, float | None],
    reference: Mapping[str, float],
    step_size: float = 1.0,
    smoothing: float = 1e-4,
) -> dict[str, float]:
    """New domain weights from how far each domain's loss is above its reference.

    With excess D_i = loss_i - reference_i, step size eta, smoothing c and k domains:

    - `paper` (Sheared LLaMA, Algorithm 1): w_i proportional to w_i exp(eta max(D_i, 0))
    - `released` (its published code): w = softmax(log w + eta D), not clipped
    - `bandit` (the same code, undocumented): w = softmax(w + eta D)
    - `constant`: w as it was, normalised

    and then, except for `constant`, w_i <- (1 - c) w_i + c / k (DoReMi, arXiv 2305.10429, Algorithm 1).

    Args:
        weights: current weights, not negative, of every domain.
        losses: mean loss in nats of each domain; one that is absent, None or not finite was not seen: excess 0.
        reference: reference loss in nats; absent or not finite: excess 0.

    Returns:
        Weights of the same domains, positive (given smoothing, or a positive weight before), summing to 1.

    Raises:
        ValueError: an unknown rule, or weights that cannot be normalised.
    """
    names = list(weights)
    old = np.array([weights[name] for name in names], dtype=np.float64)
    if not np.isfinite(old).all() or (old < 0).any() or old.sum() <= 0:
        raise ValueError(f"weights must be finite, not negative and not all zero: {dict(weights)}")
    old = old / old.sum()
    excess = np.array([_excess(losses.get(name), reference.get(name)) for name in names])
    with np.errstate(divide="ignore"):
        log_old = np.log(old)
    if rule == "constant":
        return dict(zip(names, old.tolist(), strict=True))
    if rule == "paper":
        new = _softmax(log_old + step_size * np.maximum(excess, 0.0), alive=old > 0)
    elif rule == "released":
        new = _softmax(log_old + step_size * excess, alive=old > 0)
    elif rule == "bandit":
        new = _softmax(old + step_size * excess, alive=np.ones(len(names), dtype=bool))
    else:
        raise ValueError(f"unknown rule {rule!r}; known: paper, released, bandit, constant")
    new = (1.0 - smoothing) * new + smoothing / len(names)
    new /= new.sum()
    return dict(zip(names, new.tolist(), strict=True))


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
    field = "mixture.initial_weights"
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
                allowed="a weight for every domain of data.domains",
                mend=f"add `{name}: 0.1`, or leave {name} out of data.domains",
            )
        if not math.isfinite(weights[name]) or weights[name] < 0:
            raise ShearingError(
                f"{field}.{name}", value=weights[name], allowed="a finite number, at least 0", mend="correct it"
            )
    total = sum(weights.values())
    if total <= 0:
        raise ShearingError(field, value=dict(weights), allowed="at least one weight above 0", mend="raise one")
    return {name: weights[name] / total for name in tokens}


def _excess(loss: float | None, reference: float | None) -> float:
    if loss is None or reference is None or not math.isfinite(loss) or not math.isfinite(reference):
        return 0.0
    return float(loss) - float(reference)


def _softmax(logits: npt.NDArray[np.float64], *, alive: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Softmax that leaves every alive domain above 0, however large the differences."""
    powers = np.exp(logits - logits.max())
    powers[alive] = np.maximum(powers[alive], np.finfo(np.float64).tiny)
    normalised: npt.NDArray[np.float64] = powers / powers.sum()
    return normalised
