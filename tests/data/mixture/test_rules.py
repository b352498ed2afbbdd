from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from shearing.data.mixture.rules.facts import RULES, RuleName
from shearing.data.mixture.rules.robust import worst_mix
from shearing.data.mixture.rules.update import largest_weights, rule_of, update_weights
from shearing.data.recipe import MixtureRecipe

LOSSES = {"a": 2.0, "b": 3.0, "c": 1.0}
REFERENCE = {"a": 1.5, "b": 1.0, "c": 2.0}
WEIGHTS = {"a": 0.5, "b": 0.2, "c": 0.3}
NAMES = get_args(RuleName)


def update(
    name: str,
    *,
    weights: dict[str, float],
    losses: dict[str, float | None],
    reference: dict[str, float],
    memory: dict[str, float] | None = None,
    **constants: Any,
) -> tuple[dict[str, float], dict[str, float]]:
    total = sum(weights.values())
    rule = rule_of(
        MixtureRecipe.model_validate({"update": name, **constants}),
        prior={key: weight / total for key, weight in weights.items()},
    )
    return update_weights(rule, weights=weights, losses=losses, reference=reference, memory=memory or {})


def expected(logits: list[float]) -> list[float]:
    powers = np.exp(logits)
    return (powers / powers.sum()).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_is_what_its_facts_say(name: str) -> None:
    rule: Any = rule_of(MixtureRecipe.model_validate({"update": name}), prior=WEIGHTS)
    facts = RULES[name]
    arguments = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    assert arguments.keys() - {"prior"} == set(facts.constants)
    assert ("prior" in arguments) == facts.knows_prior
    for constant in facts.constants:
        assert arguments[constant] == MixtureRecipe.model_fields[constant].default


@pytest.mark.parametrize(
    ("rule", "logits"),
    [
        ("paper", [math.log(0.5) + 1.0, math.log(0.2) + 4.0, math.log(0.3)]),
        ("released", [math.log(0.5) + 1.0, math.log(0.2) + 4.0, math.log(0.3) - 2.0]),
        ("bandit", [0.5 + 1.0, 0.2 + 4.0, 0.3 - 2.0]),
        ("constant", [math.log(0.5), math.log(0.2), math.log(0.3)]),
    ],
)
def test_rules_by_hand(rule: str, logits: list[float]) -> None:
    new, memory = update(rule, weights=WEIGHTS, losses=LOSSES, reference=REFERENCE, step_size=2.0, smoothing=0.0)
    assert list(new.values()) == pytest.approx(expected(logits), rel=1e-14)
    assert memory == {}


def test_robust_by_hand() -> None:
    # Two equal halves: the divergence is (2 q - 1)^2 / 2, so q = 1/2 + sqrt(2 rho) / 2.
    halves = {"a": 0.5, "b": 0.5}
    new, memory = update("robust", weights=halves, losses={"a": 2.0, "b": 3.0}, reference={"a": 1.0, "b": 1.0})
    assert new["b"] == pytest.approx(0.5 + math.sqrt(2 * 0.05) / 2, rel=1e-14)
    assert memory == {"a": 2.0, "b": 3.0}
    # A bound too wide to matter: all but the floor goes to the worst.
    wide, _ = update("robust", weights=WEIGHTS, losses=LOSSES, reference=REFERENCE, divergence=100.0, floor=0.25)
    assert wide == pytest.approx({"a": 0.125, "b": 0.8, "c": 0.075}, rel=1e-14)


def test_robust_goes_by_the_running_loss_and_the_prior() -> None:
    constants = {"weights": {"a": 0.5, "b": 0.5}, "reference": {"a": 1.0, "b": 1.0}}
    _, memory = update("robust", losses={"a": 2.0, "b": 4.0}, **constants)
    _, memory = update("robust", losses={"a": 3.0, "b": None}, memory=memory, **constants)
    assert memory == {"a": pytest.approx(0.9 * 2.0 + 0.1 * 3.0), "b": 4.0}
    _, newest = update("robust", losses={"a": 3.0, "b": 1.0}, memory=memory, loss_ema=1.0, **constants)
    assert newest == {"a": 3.0, "b": 1.0}
    # The same losses again and again: the same weights, where the exponential rules would go on.
    rule = rule_of(MixtureRecipe(update="robust"), prior={"a": 0.5, "b": 0.5})
    weights, memory = {"a": 0.5, "b": 0.5}, {}
    seen = []
    for _ in range(3):
        weights, memory = update_weights(
            rule, weights=weights, losses={"a": 2.0, "b": 3.0}, reference=constants["reference"], memory=memory
        )
        seen.append(weights)
    assert seen[0] == seen[1] == seen[2]


def test_smoothing_blends_in_the_uniform_mix() -> None:
    sharp, _ = update("paper", weights=WEIGHTS, losses=LOSSES, reference=REFERENCE, smoothing=0.0)
    smooth, _ = update("paper", weights=WEIGHTS, losses=LOSSES, reference=REFERENCE, smoothing=0.3)
    assert smooth == pytest.approx({name: 0.7 * w + 0.1 for name, w in sharp.items()}, rel=1e-14)


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("unseen", [None, math.nan, math.inf, "absent"])
def test_a_domain_not_seen_has_no_excess(rule: str, unseen: object) -> None:
    losses: dict[str, float | None] = {**LOSSES, "b": unseen}  # type: ignore[dict-item]
    if unseen == "absent":
        del losses["b"]
    at_reference: dict[str, float | None] = {**LOSSES, "b": REFERENCE["b"]}
    blind, _ = update(rule, weights=WEIGHTS, losses=losses, reference=REFERENCE)
    assert blind == update(rule, weights=WEIGHTS, losses=at_reference, reference=REFERENCE)[0]


number = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])


@given(
    rule=st.sampled_from(NAMES),
    values=st.lists(st.tuples(st.floats(1e-12, 1.0), number, number), min_size=1, max_size=8),
    step_size=st.floats(1e-3, 100.0),
    smoothing=st.floats(0.0, 1.0),
)
def test_weights_stay_a_distribution_and_lose_no_domain(
    rule: str, values: list[tuple[float, float, float]], step_size: float, smoothing: float
) -> None:
    weights = {str(i): weight for i, (weight, _, _) in enumerate(values)}
    new, memory = update(
        rule,
        weights=weights,
        losses={str(i): loss for i, (_, loss, _) in enumerate(values)},
        reference={str(i): reference for i, (_, _, reference) in enumerate(values)},
        step_size=step_size,
        smoothing=smoothing,
    )
    assert list(new) == list(weights)
    assert sum(new.values()) == pytest.approx(1.0, abs=1e-12)
    assert all(weight > 0 for weight in new.values())
    assert json.loads(json.dumps(memory, allow_nan=False)) == memory
    total = sum(weights.values())
    chosen = rule_of(
        MixtureRecipe.model_validate({"update": rule, "step_size": step_size, "smoothing": smoothing}),
        prior={name: weight / total for name, weight in weights.items()},
    )
    most = largest_weights(chosen, prior={name: weight / total for name, weight in weights.items()})
    assert all(new[name] <= most[name] + 1e-9 for name in new)


def test_what_cannot_be_normalised_is_refused() -> None:
    rule = rule_of(MixtureRecipe(), prior=WEIGHTS)
    for weights in ({"a": 0.0}, {"a": math.nan}, {"a": 2.0, "b": -1.0}):
        with pytest.raises(ValueError, match="weights"):
            update_weights(rule, weights=weights, losses={}, reference={}, memory={})


problems = st.integers(1, 6).flatmap(
    lambda count: st.tuples(
        st.lists(st.floats(-5.0, 5.0), min_size=count, max_size=count),
        st.lists(st.floats(0.01, 1.0), min_size=count, max_size=count),
        st.floats(1e-4, 3.0),
        st.floats(0.0, 1.0),
    )
)


def divergence_of(mix: np.ndarray, prior: np.ndarray) -> float:
    return float(0.5 * (prior * (mix / prior - 1.0) ** 2).sum())


def by_enumeration(gains: np.ndarray, *, prior: np.ndarray, divergence: float, floor: float) -> float:
    """The optimum's value, from every set of domains at the floor: the others on the sphere, or a tie of the best."""
    best = -math.inf
    count = len(gains)
    for size in range(count):
        for at_floor in itertools.combinations(range(count), size):
            free = np.array([i for i in range(count) if i not in at_floor])
            fixed = np.array(at_floor, dtype=int)
            rest = 1.0 - floor * prior[fixed].sum()
            mass = prior[free].sum()
            base = np.full(count, floor)
            base[free] = rest / mass
            mean = (prior[free] * gains[free]).sum() / mass
            direction = np.zeros(count)
            direction[free] = gains[free] - mean
            slack = 2.0 * (divergence - divergence_of(base * prior, prior))
            length = (prior * direction**2).sum()
            for scale in (0.0, math.sqrt(slack / length) if slack > 0 and length > 1e-14 else 0.0):
                mix = (base + scale * direction) * prior
                fits = divergence_of(mix, prior) <= divergence * (1 + 1e-9) + 1e-12
                if fits and (mix >= floor * prior - 1e-12).all():
                    best = max(best, float(mix @ gains))
    return best


@given(problems)
def test_worst_mix_is_feasible_and_optimal(problem: tuple[list[float], list[float], float, float]) -> None:
    gains, prior = np.array(problem[0]), np.array(problem[1])
    prior = prior / prior.sum()
    divergence, floor = problem[2:]
    assume(np.ptp(gains) == 0 or np.ptp(gains) > 1e-3)
    mix = worst_mix(gains, prior=prior, divergence=divergence, floor=floor)
    assert mix.sum() == pytest.approx(1.0, abs=1e-12)
    assert divergence_of(mix, prior) <= divergence + 1e-9
    assert (mix >= floor * prior - 1e-12).all()
    assert float(mix @ gains) >= by_enumeration(gains, prior=prior, divergence=divergence, floor=floor) - 1e-7


@given(problems, st.floats(0.1, 10.0), st.floats(-3.0, 3.0), st.randoms())
def test_worst_mix_knows_only_ratios_of_differences_and_no_order(
    problem: tuple[list[float], list[float], float, float], scale: float, shift: float, chance: Any
) -> None:
    gains, prior = np.round(np.array(problem[0]), 2), np.array(problem[1])
    prior = prior / prior.sum()
    divergence, floor = problem[2:]
    mix = worst_mix(gains, prior=prior, divergence=divergence, floor=floor)
    assume(np.ptp(gains) > 0)
    moved = worst_mix(scale * gains + shift, prior=prior, divergence=divergence, floor=floor)
    np.testing.assert_allclose(moved, mix, atol=1e-6)
    order = list(range(len(gains)))
    chance.shuffle(order)
    shuffled = worst_mix(gains[order], prior=prior[order], divergence=divergence, floor=floor)
    np.testing.assert_allclose(shuffled, mix[order], atol=1e-9)
    # More excess never means a smaller share of the prior.
    by_gain = np.argsort(gains, kind="stable")
    assert (np.diff((mix / prior)[by_gain]) >= -1e-9).all()


def test_worst_mix_at_its_limits() -> None:
    prior = np.array([0.5, 0.3, 0.2])
    gains = np.array([1.0, 2.0, 3.0])
    assert worst_mix(gains, prior=prior, divergence=0.0, floor=0.2) == pytest.approx(prior)
    assert worst_mix(gains, prior=prior, divergence=1.0, floor=1.0) == pytest.approx(prior)
    assert worst_mix(np.ones(3), prior=prior, divergence=1.0, floor=0.0) == pytest.approx(prior)
    assert worst_mix(gains, prior=prior, divergence=1e6, floor=0.0) == pytest.approx([0.0, 0.0, 1.0])
    tied = worst_mix(np.array([0.0, 1.0, 1.0]), prior=prior, divergence=1e6, floor=0.0)
    assert tied == pytest.approx([0.0, 0.6, 0.4])
    assert worst_mix(gains, prior=np.array([0.5, 0.5, 0.0]), divergence=0.05, floor=0.2)[2] == 0.0


def test_the_largest_weight_is_reached() -> None:
    rule = rule_of(MixtureRecipe(update="robust"), prior=WEIGHTS)
    most = largest_weights(rule, prior=WEIGHTS)
    for name in WEIGHTS:
        losses = {other: 3.0 if other == name else 1.0 for other in WEIGHTS}
        new, _ = update_weights(rule, weights=WEIGHTS, losses=losses, reference=dict.fromkeys(WEIGHTS, 1.0), memory={})
        assert new[name] == pytest.approx(most[name], rel=1e-12)
    paper = rule_of(MixtureRecipe(smoothing=0.3), prior=WEIGHTS)
    assert largest_weights(paper, prior=WEIGHTS) == pytest.approx(dict.fromkeys(WEIGHTS, 0.8))
    assert largest_weights(rule_of(MixtureRecipe(update="constant"), prior=WEIGHTS), prior=WEIGHTS) == WEIGHTS
