from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, strategies as st

from shearing.errors import ShearingError
from shearing.mixture import resolve_reference, resolve_weights, update_weights
from shearing.mixture.weights import Rule

LOSSES = {"a": 2.0, "b": 3.0, "c": 1.0}
REFERENCE = {"a": 1.5, "b": 1.0, "c": 2.0}
WEIGHTS = {"a": 0.5, "b": 0.2, "c": 0.3}


def expected(logits: list[float]) -> list[float]:
    powers = np.exp(logits)
    return (powers / powers.sum()).tolist()


@pytest.mark.parametrize(
    ("rule", "logits"),
    [
        ("paper", [math.log(0.5) + 1.0, math.log(0.2) + 4.0, math.log(0.3)]),
        ("released", [math.log(0.5) + 1.0, math.log(0.2) + 4.0, math.log(0.3) - 2.0]),
        ("bandit", [0.5 + 1.0, 0.2 + 4.0, 0.3 - 2.0]),
        ("constant", [math.log(0.5), math.log(0.2), math.log(0.3)]),
    ],
)
def test_rules_by_hand(rule: Rule, logits: list[float]) -> None:
    new = update_weights(rule, weights=WEIGHTS, losses=LOSSES, reference=REFERENCE, step_size=2.0, smoothing=0.0)
    assert list(new.values()) == pytest.approx(expected(logits), rel=1e-14)


def test_smoothing_blends_in_the_uniform_mix() -> None:
    sharp = update_weights("paper", weights=WEIGHTS, losses=LOSSES, reference=REFERENCE, smoothing=0.0)
    smooth = update_weights("paper", weights=WEIGHTS, losses=LOSSES, reference=REFERENCE, smoothing=0.3)
    assert smooth == pytest.approx({name: 0.7 * w + 0.1 for name, w in sharp.items()}, rel=1e-14)


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("unseen", [None, math.nan, math.inf, "absent"])
def test_a_domain_not_seen_has_no_excess(rule: Rule, unseen: object) -> None:
    losses: dict[str, float | None] = {**LOSSES, "b": unseen}  # type: ignore[dict-item]
    if unseen == "absent":
        del losses["b"]
    at_reference = {**LOSSES, "b": REFERENCE["b"]}
    assert update_weights(rule, weights=WEIGHTS, losses=losses, reference=REFERENCE) == update_weights(
        rule, weights=WEIGHTS, losses=at_reference, reference=REFERENCE
    )


number = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])


@given(
    rule=st.sampled_from(get_args(Rule)),
    values=st.lists(st.tuples(st.floats(1e-12, 1.0), number, number), min_size=1, max_size=8),
    step_size=st.floats(1e-3, 100.0),
    smoothing=st.floats(0.0, 1.0),
)
def test_weights_stay_a_distribution_and_lose_no_domain(
    rule: Rule, values: list[tuple[float, float, float]], step_size: float, smoothing: float
) -> None:
    new = update_weights(
        rule,
        weights={str(i): weight for i, (weight, _, _) in enumerate(values)},
        losses={str(i): loss for i, (_, loss, _) in enumerate(values)},
        reference={str(i): reference for i, (_, _, reference) in enumerate(values)},
        step_size=step_size,
        smoothing=smoothing,
    )
    assert list(new) == [str(i) for i in range(len(values))]
    assert sum(new.values()) == pytest.approx(1.0, abs=1e-12)
    assert all(weight > 0 for weight in new.values())


def test_what_cannot_be_normalised_is_refused() -> None:
    for weights in ({"a": 0.0}, {"a": math.nan}, {"a": 2.0, "b": -1.0}):
        with pytest.raises(ValueError, match="weights"):
            update_weights("paper", weights=weights, losses={}, reference={})
    with pytest.raises(ValueError, match="unknown rule"):
        update_weights("papr", weights=WEIGHTS, losses={}, reference={})  # type: ignore[arg-type]


def test_resolve_weights() -> None:
    tokens = {"books": 300, "code": 100}
    assert resolve_weights("uniform", tokens=tokens) == {"books": 0.5, "code": 0.5}
    assert resolve_weights("proportional", tokens=tokens) == {"books": 0.75, "code": 0.25}
    assert resolve_weights({"code": 6.0, "books": 2.0}, tokens=tokens) == {"books": 0.25, "code": 0.75}
    for weights, message in (
        ({"books": 1.0, "cod": 1.0}, "did you mean code"),
        ({"books": 1.0}, "nothing for domain code"),
        ({"books": 1.0, "code": -1.0}, "at least 0"),
        ({"books": 1.0, "code": math.nan}, "at least 0"),
        ({"books": 0.0, "code": 0.0}, "above 0"),
    ):
        with pytest.raises(ShearingError, match=message):
            resolve_weights(weights, tokens=tokens)


def reference(given: object) -> dict[str, float]:
    return resolve_reference(
        SimpleNamespace(reference=given),  # type: ignore[arg-type]
        domains=["books", "code"],
        measure_source=lambda: {"books": 3.5, "code": 2.5},
    )


def test_references_from_recipe_file_and_source(tmp_path: Path) -> None:
    assert reference("source") == {"books": 3.5, "code": 2.5}
    assert reference({"books": 1, "code": 2.0, "more": 9.0}) == {"books": 1.0, "code": 2.0}
    file = tmp_path / "reference.json"
    file.write_text(json.dumps({"books": 1.25, "code": 2.5}))
    assert reference(file) == {"books": 1.25, "code": 2.5}


def test_reference_errors(tmp_path: Path) -> None:
    file = tmp_path / "reference.json"
    with pytest.raises(ShearingError, match="correct the path"):
        reference(file)
    file.write_text("[1]")
    with pytest.raises(ShearingError, match="JSON object"):
        reference(file)
    with pytest.raises(ShearingError, match="did you mean cod"):
        reference({"books": 1.0, "cod": 2.0})
    with pytest.raises(ShearingError, match=r"set mixture\.reference to source"):
        reference({"books": 1.0})
    for bad in (math.nan, -1.0, "2", None, True):
        with pytest.raises(ShearingError, match="nats"):
            reference({"books": 1.0, "code": bad})
