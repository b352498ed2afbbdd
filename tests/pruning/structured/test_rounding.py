"""Rounding: exactly the target, in every row, and layers an ordinary config can hold."""

from __future__ import annotations

from itertools import combinations

import torch
from hypothesis import given, settings, strategies as st

from shearing.pruning.structured.rounding import alternating, top_k


@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_top_k_keeps_exactly_the_best(rows, units, data):
    keep = data.draw(st.integers(1, units))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    scores = torch.randint(4, (rows, units), generator=generator).float()
    mask = top_k(scores, keep=keep)
    assert (mask.sum(-1) == keep).all()
    kept = torch.where(mask > 0, scores, torch.inf).min(-1).values
    dropped = torch.where(mask > 0, -torch.inf, scores).max(-1).values
    assert (kept >= dropped).all()


def test_ties_go_to_the_lower_index():
    assert top_k(torch.zeros(5), keep=2).tolist() == [1, 1, 0, 0, 0]


@settings(deadline=None)
@given(st.integers(1, 5), st.data())
def test_alternating_finds_the_best_order_that_an_ordinary_layer_has(layers, data):
    keep = data.draw(st.integers(1, layers))
    scores = torch.tensor(data.draw(st.lists(st.floats(-3, 3), min_size=2 * layers, max_size=2 * layers)))
    attention, mlp = scores[:layers], scores[layers:]
    best = max(
        sum(float(attention[a]) + float(mlp[m]) for a, m in zip(kept_a, kept_m, strict=True))
        for kept_a in combinations(range(layers), keep)
        for kept_m in combinations(range(layers), keep)
        if all(a <= m for a, m in zip(kept_a, kept_m, strict=True))
        and all(m < a for m, a in zip(kept_m, kept_a[1:], strict=False))
    )
    a, m = alternating(attention, mlp, keep=keep)
    assert a.sum() == m.sum() == keep
    assert abs(float((a * attention).sum() + (m * mlp).sum()) - best) < 1e-4
    for first, second in zip(a.nonzero().flatten().tolist(), m.nonzero().flatten().tolist(), strict=True):
        assert first <= second
