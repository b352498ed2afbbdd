"""Rows of a target, their ranks, and sums that are kept."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, settings, strategies as st

from shearing.models.shape import Shape
from shearing.pruning.structured.importance.learned.rows import at_most, ranks, searched, with_sum
from tests.models.tiny import tiny_model

rows = st.lists(st.floats(-3.0, 4.0), min_size=2, max_size=12)


@given(rows, st.floats(0.0, 1.0), st.floats(0.0, 0.2))
@settings(max_examples=80, deadline=None)
def test_a_shifted_row_has_its_sum_and_keeps_its_order(row: list[float], share: float, margin: float) -> None:
    values, low, high = torch.tensor([row, row[::-1]], dtype=torch.float64), margin, 1 - margin
    total = len(row) * (low + share * (high - low))
    shifted = with_sum(values, total=total, low=low, high=high)
    torch.testing.assert_close(shifted.sum(-1), torch.full((2,), total, dtype=torch.float64))
    assert (shifted >= low).all()
    assert (shifted <= high).all()
    order = values.argsort(-1)
    assert (shifted.gather(-1, order).diff(dim=-1) >= 0).all()


@given(rows, st.floats(0.0, 1.0))
@settings(max_examples=80, deadline=None)
def test_a_row_above_its_budget_comes_down_to_it_and_others_stay(row: list[float], share: float) -> None:
    values = torch.tensor(row, dtype=torch.float64)
    total = share * len(row)
    projected = at_most(values, total=total, low=0.0, high=1.0)
    assert float(projected.sum()) <= total + 1e-9
    clamped = values.clamp(0, 1)
    if float(clamped.sum()) <= total:
        assert torch.equal(projected, clamped)
    else:
        assert abs(float(projected.sum()) - total) < 1e-9
        # The nearest point of {0 <= s <= 1, sum s <= total}: nothing else that is allowed is nearer.
        generator = torch.Generator().manual_seed(0)
        others = torch.rand(50, len(row), generator=generator, dtype=torch.float64)
        others = others * (total / others.sum(-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
        assert ((projected - values).norm() <= (others - values).norm(dim=-1) + 1e-9).all()


def test_ranks_break_ties_by_the_second_order() -> None:
    scores = torch.tensor([[0.5, 0.1, 0.5, 0.5], [1.0, 1.0, 0.0, 2.0]])
    ties = torch.tensor([[3.0, 9.0, 1.0, 2.0], [1.0, 0.0, 7.0, 7.0]])
    assert ranks(scores, ties=ties).tolist() == [[3.0, 0.0, 1.0, 2.0], [2.0, 1.0, 0.0, 3.0]]
    assert ranks(torch.tensor([3.0, 1.0, 2.0])).tolist() == [2.0, 0.0, 1.0]


def test_only_what_the_target_takes_from_is_searched() -> None:
    source = Shape.of(tiny_model().config)
    target = dataclasses.replace(source, num_hidden_layers=3, intermediate_size=20)
    assert {g.name: g.target for g in searched(source, target=target)} == {"layers": 3, "intermediate": 20}
    assert searched(source, target=source) == ()
    halves = {g.name: g.target for g in searched(source, target=None)}
    assert halves == {"layers": 2, "kv_groups": 2, "query_heads": 1, "intermediate": 20, "hidden": 18}
