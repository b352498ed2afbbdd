from __future__ import annotations

import json
import math

import pytest

from shearing.data.mixture.averages import LossAverages, LossMeans


def test_a_domain_starts_at_its_first_loss_and_keeps_its_average_while_it_is_not_seen() -> None:
    averages = LossAverages(weight=0.1)
    assert averages.losses == {}
    averages.add({"books": 4.0})
    averages.add({"books": 3.0, "code": 2.0})
    averages.add({"code": 1.0})
    assert averages.losses == pytest.approx({"books": 0.9 * 4.0 + 0.1 * 3.0, "code": 0.9 * 2.0 + 0.1 * 1.0})


def test_what_is_not_finite_leaves_no_trace() -> None:
    averages = LossAverages(weight=0.5)
    averages.add({"books": math.nan, "code": 2.0})
    averages.add({"books": math.inf, "code": math.nan})
    assert averages.losses == {"code": 2.0}


def test_a_state_goes_on_to_the_bit() -> None:
    losses = [{"books": 1 / (step + 3), "code": math.sqrt(step)} for step in range(20)]
    whole, first, second = (LossAverages(weight=0.1) for _ in range(3))
    for step in losses:
        whole.add(step)
    for step in losses[:7]:
        first.add(step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in losses[7:]:
        second.add(step)
    assert second.losses == whole.losses


def test_means_beside_a_reference_are_over_tokens_and_begin_anew() -> None:
    means = LossMeans()
    means.add({"a": 4.0, "b": 2.0}, reference={"a": 3.0, "b": 2.5}, labels={"a": 10.0, "b": 5.0})
    means.add({"a": 2.0}, reference={"a": 2.0}, labels={"a": 30.0})
    means.add({"a": math.nan}, reference={"a": 2.0}, labels={"a": 30.0})
    again = LossMeans()
    again.load_state_dict(json.loads(json.dumps(means.state_dict())))
    for each in (means, again):
        assert each.losses == {"a": 2.5, "b": 2.0}
        assert each.reference == {"a": 2.25, "b": 2.5}
    means.clear()
    assert means.losses == means.reference == {}
