"""The hard concrete distribution: its formulas, and the two defects that must not come back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from shearing.pruning.structured import hard_concrete
from shearing.pruning.structured.hard_concrete import LOG_ALPHA_LIMIT


@pytest.mark.parametrize("temperature", [2 / 3, 0.83])
def test_probability_alive_is_the_share_of_nonzero_draws(temperature):
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    noise = torch.rand(200_000, 5, generator=torch.Generator().manual_seed(0))
    drawn = (hard_concrete.sample(log_alpha, noise=noise, temperature=temperature) > 0).float().mean(0)
    expected = hard_concrete.probability_alive(log_alpha, temperature=temperature)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=5e-3)


def test_the_released_bias_at_the_bounds_and_its_removal():
    ends = torch.tensor([-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT])
    assert hard_concrete.probability_alive(ends).tolist() == pytest.approx([0.04713, 0.99798], abs=1e-4)
    assert hard_concrete.expected_alive(ends).tolist() == [0.0, 1.0]


@given(st.floats(-LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT), st.floats(0.0, 1.0))
def test_draws_are_in_the_unit_interval_and_finite(log_alpha, noise):
    z = hard_concrete.sample(torch.tensor(log_alpha), noise=torch.tensor(noise))
    assert 0.0 <= float(z) <= 1.0


def test_expectation_rises_with_log_alpha_and_has_a_gradient_everywhere():
    log_alpha = torch.linspace(-LOG_ALPHA_LIMIT + 1e-3, LOG_ALPHA_LIMIT - 1e-3, 101).requires_grad_()
    expected = hard_concrete.expected_alive(log_alpha)
    assert (expected.diff() > 0).all()
    assert (torch.autograd.grad(expected.sum(), log_alpha)[0] > 0).all()


def test_open_means_a_median_draw_above_one_half():
    half = torch.tensor(0.5)
    assert float(hard_concrete.sample(torch.tensor(0.0), noise=half)) == pytest.approx(0.5)
    assert hard_concrete.is_open(torch.tensor([-0.1, 0.1])).tolist() == [False, True]
    assert math.isclose(LOG_ALPHA_LIMIT, math.log(100))
