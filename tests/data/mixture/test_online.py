from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from shearing.data.mixture.dynamic import DynamicMixture, State
from shearing.data.mixture.online import (
    EXPONENTS,
    MAXIMUM_OBSERVATIONS,
    MINIMUM_OBSERVATIONS,
    Observation,
    fit_online,
    predict_end,
)
from shearing.data.mixture.rules.update import rule_of
from shearing.data.recipe import MixtureRecipe

SIZES = np.linspace(2.0, 1.0, 12) ** 2
TOKENS = np.linspace(0.05, 0.6, 12)


@given(
    offset=st.floats(0.5, 3.0),
    size=st.floats(0.1, 3.0),
    training=st.floats(0.1, 3.0),
    alpha=st.sampled_from(EXPONENTS),
    beta=st.sampled_from(EXPONENTS),
)
def test_losses_that_follow_the_law_give_its_end(
    offset: float, size: float, training: float, alpha: float, beta: float
) -> None:
    losses = offset + size * SIZES**-alpha + training * TOKENS**-beta
    law = fit_online(SIZES, tokens=TOKENS, losses=losses)
    assert law.at_end == pytest.approx(offset + size + training, rel=2e-3)


@given(st.lists(st.floats(0.01, 20.0), min_size=MINIMUM_OBSERVATIONS, max_size=20), st.booleans())
def test_every_fit_is_physical(losses: list[float], moving: bool) -> None:
    count = len(losses)
    sizes = np.linspace(3.0, 1.0, count) if moving else np.full(count, 1.0)
    law = fit_online(sizes, tokens=np.linspace(0.1, 0.9, count), losses=np.array(losses))
    assert min(law.offset, law.size, law.training) >= 0
    assert 0 < law.at_end <= max(losses) * 2 if not moving else law.at_end > 0
    assert moving or law.size == 0


def test_noise_moves_the_prediction_little() -> None:
    clean = 2.0 + 0.8 * TOKENS**-0.3
    noise = 0.005 * np.random.default_rng(0).standard_normal(len(clean))
    law = fit_online(np.ones(12), tokens=TOKENS, losses=clean + noise)
    assert law.at_end == pytest.approx(2.8, abs=0.05)


def test_nothing_is_predicted_before_there_is_enough_to_go_by() -> None:
    observations = [
        Observation(parameters=100.0, tokens=10 * i, losses={"a": 3.0 / i} if i % 2 else {"a": 3.0 / i, "b": 2.0})
        for i in range(1, MINIMUM_OBSERVATIONS + 1)
    ]
    few = predict_end(observations[:-1], domains=["a", "b"], parameters=100, tokens=1000)
    assert few == {}
    assert list(predict_end(observations, domains=["a", "b"], parameters=100, tokens=1000)) == ["a"]


def dynamic(*, online: bool = True, update: str = "paper") -> DynamicMixture:
    return DynamicMixture(
        rule=rule_of(MixtureRecipe.model_validate({"update": update}), prior={"a": 0.5, "b": 0.5}),
        reference={"a": 1.0, "b": 1.0},
        parameters=100,
        tokens=1000,
        online=online,
        state={"memory": {}},
    )


@pytest.mark.parametrize("rule", ["paper", "robust"])
def test_a_state_that_went_through_json_goes_on_the_same(rule: str) -> None:
    mixture = dynamic(update=rule)
    plain = stored = mixture.state
    weights = {"a": 0.5, "b": 0.5}
    references = []
    for i in range(1, MAXIMUM_OBSERVATIONS + 4):
        losses = {"a": 2.0 + 0.3 / i, "b": 2.0 + 1.0 / i}
        arguments = {"losses": losses, "parameters": 100.0 + 7 / i, "tokens": 10 * i}
        update = mixture.update(weights, **arguments, state=plain)  # type: ignore[arg-type]
        again = mixture.update(weights, **arguments, state=json.loads(json.dumps(stored)))  # type: ignore[arg-type]
        assert update == again
        plain, stored, weights = update.state, again.state, update.weights
        references.append(update.reference)
    assert len(plain["observations"]) == MAXIMUM_OBSERVATIONS
    assert references[MINIMUM_OBSERVATIONS - 2] == {"a": 1.0, "b": 1.0}
    assert references[MINIMUM_OBSERVATIONS - 1] != {"a": 1.0, "b": 1.0}
    assert references[-1]["a"] == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_observation(bad: float) -> None:
    mixture, state = dynamic(), {}
    whole: State = {}
    weights = {"a": 0.5, "b": 0.5}
    for i in range(1, 2 * MINIMUM_OBSERVATIONS):
        losses = {"a": 2.0 + 0.3 / i, "b": 2.0 + 1.0 / i}
        arguments = {"parameters": 100.0, "tokens": 10 * i}
        whole = mixture.update(weights, losses=losses, **arguments, state=whole).state  # type: ignore[arg-type]
        torn = losses if i != 3 else {**losses, "a": bad}
        update = mixture.update(weights, losses=torn, **arguments, state=state)  # type: ignore[arg-type]
        state = json.loads(json.dumps(update.state, allow_nan=False))
        # One observation less, so one update later.
        assert (update.reference["a"] == 1.0) == (i <= MINIMUM_OBSERVATIONS)
        assert math.isfinite(update.reference["a"])
    assert [each["losses"].keys() for each in state["observations"][1:4]] == [{"a", "b"}, {"b"}, {"a", "b"}]
    # As checkpoints of earlier versions have it.
    old = [Observation.from_json(each) for each in whole["observations"]]
    arguments = {"domains": weights, "parameters": 100, "tokens": 1000}
    predicted = predict_end([*old, Observation(parameters=100.0, tokens=300, losses={"a": bad})], **arguments)  # type: ignore[arg-type]
    assert predicted == predict_end(old, **arguments)  # type: ignore[arg-type]


def test_what_is_hard_in_an_updates_text_cancels_in_the_running_excess() -> None:
    mixture, weights, state = dynamic(online=False, update="robust"), {"a": 0.5, "b": 0.5}, {"memory": {}}
    texts = [2.0, 2.0, 5.0, 3.0]
    for number, teacher in enumerate(texts):
        reference = {"a": teacher, "b": teacher}
        losses = {"a": teacher + 0.5, "b": teacher}
        if number == 3:  # not seen since the update before
            del losses["a"], reference["a"]
        update = mixture.update(
            weights, losses=losses, reference=reference, parameters=100.0, tokens=10 + number, state=state
        )
        # Always half a nat: the same weights as after the first update, half and sqrt(2 rho) / 2.
        assert update.weights["a"] == pytest.approx(0.5 + math.sqrt(2 * 0.05) / 2, rel=1e-12)
        assert update.reference == reference
        state = json.loads(json.dumps(update.state))
    assert state["excess"] == pytest.approx({"a": 0.5, "b": 0.0})
    # A state of a version that remembered losses beside a teacher: the excess begins anew.
    older = {"memory": {"a": 2.5, "b": 2.0}, "observations": []}
    arguments = {"losses": {"a": 2.0, "b": 2.5}, "reference": {"a": 2.0, "b": 2.0}, "parameters": 100.0, "tokens": 10}
    assert mixture.update(weights, **arguments, state=older) == mixture.update(weights, **arguments, state={})  # type: ignore[arg-type]


def test_without_online_nothing_is_collected() -> None:
    update = dynamic(online=False).update(
        {"a": 0.5, "b": 0.5}, losses={"a": 2.0, "b": 3.0}, parameters=100.0, tokens=10, state={}
    )
    assert update.reference == {"a": 1.0, "b": 1.0}
    assert update.state == {"memory": {}, "observations": []}
