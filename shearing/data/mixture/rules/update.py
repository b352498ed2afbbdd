"""Update rules of the domain weights by name, and weights by domain as they see them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

import numpy as np

from shearing.data.mixture.rules.facts import RULES
from shearing.data.mixture.rules.rule import Rule, Seen, Vector
from shearing.data.recipe import MixtureRecipe

Memory = dict[str, float]
"""What a rule remembers between two updates: a number for each domain of which it knows one. JSON-able."""


def rule_of(mixture: MixtureRecipe, *, prior: Mapping[str, float]) -> Rule:
    """The rule that a recipe names, with its constants.

    Args:
        mixture: names the rule.
        prior: weights before the first update of the run, summing to 1.
    """
    facts = RULES[mixture.update]
    constants: dict[str, Any] = {name: getattr(mixture, name) for name in facts.constants}
    if facts.knows_prior:
        constants["prior"] = np.array(list(prior.values()), dtype=np.float64)
    rule: Rule = resolve_name(facts.home)(**constants)
    return rule


def update_weights(
    rule: Rule,
    *,
    weights: Mapping[str, float],
    losses: Mapping[str, float | None],
    reference: Mapping[str, float],
    memory: Mapping[str, float],
) -> tuple[dict[str, float], Memory]:
    """New domain weights from how far each domain's loss is above its reference, and what to remember.

    Args:
        rule: how.
        weights: current weights, not negative, of every domain, in the order of the rule's prior.
        losses: mean loss in nats of each domain; one that is absent, None or not finite was not seen.
        reference: reference loss in nats; absent or not finite: the domain's excess is 0.
        memory: what the update before left; empty at the first.

    Returns:
        Weights of the same domains, summing to 1, and the memory for the next update.

    Raises:
        ValueError: weights that cannot be normalised.
    """
    names = list(weights)
    old = _vector(weights, names=names)
    if not np.isfinite(old).all() or (old < 0).any() or old.sum() <= 0:
        raise ValueError(f"weights must be finite, not negative and not all zero: {dict(weights)}")
    seen = Seen(weights=old / old.sum(), losses=_vector(losses, names=names), reference=_vector(reference, names=names))
    new, remembered = rule.update(seen, memory=_vector(memory, names=names))
    kept = {name: value for name, value in zip(names, remembered.tolist(), strict=True) if math.isfinite(value)}
    return dict(zip(names, new.tolist(), strict=True)), kept


def largest_weights(rule: Rule, *, prior: Mapping[str, float]) -> dict[str, float]:
    """The largest weight that `rule` can ever give each domain.

    Args:
        rule: how weights are updated.
        prior: weights before the first update, summing to 1.
    """
    largest = rule.largest(np.array(list(prior.values()), dtype=np.float64))
    return dict(zip(prior, largest.tolist(), strict=True))


def _vector(values: Mapping[str, float | None], *, names: list[str]) -> Vector:
    """float64 [domains]; NaN where there is no finite number."""
    found = (values.get(name) for name in names)
    return np.array([math.nan if value is None or not math.isfinite(value) else value for value in found])
