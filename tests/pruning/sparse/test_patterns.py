"""Patterns hold for any shape, any N:M and any dtype; budgets are met to one element; ties go as in torch.topk."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, strategies as st

from shearing.errors import ShearingError
from shearing.pruning.sparse.patterns import (
    CUMULATIVE_TOLERANCE,
    Cumulative,
    KeptOf,
    PerLayer,
    PerRow,
    exact,
    pattern_of,
    unstructured,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
sparsities = st.decimals(min_value="0.001", max_value="0.999", places=3).map(lambda share: Fraction(str(share)))


def random_scores(rows: int, columns: int, *, seed: int, dtype: torch.dtype, ties: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns, generator=generator)
    return ((scores * 3).round() if ties else scores).to(dtype)


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 9),
    of=st.integers(1, 12),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_kept_of_keeps_exactly_n_of_each_group(
    rows: int, groups: int, of: int, data: st.DataObject, dtype: torch.dtype, ties: bool, seed: int
) -> None:
    pattern = KeptOf(data.draw(st.integers(1, of)), of)
    scores = random_scores(rows, groups * of, seed=seed, dtype=dtype, ties=ties)
    mask = pattern.keep(scores)
    assert mask.shape == scores.shape
    assert mask.dtype == torch.bool
    assert pattern.holds(mask)
    for row, kept in zip(scores.float().tolist(), mask.tolist(), strict=True):
        for start in range(0, len(row), of):
            group, bits = row[start : start + of], kept[start : start + of]
            assert sum(bits) == pattern.kept
            lowest_kept = min(score for score, bit in zip(group, bits, strict=True) if bit)
            assert all(score <= lowest_kept for score, bit in zip(group, bits, strict=True) if not bit)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    sparsity=sparsities,
    group=st.sampled_from(["row", "layer"]),
    dtype=st.sampled_from(DTYPES),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_unstructured_budgets_are_met_to_one_element(
    rows: int, columns: int, sparsity: Fraction, group: str, dtype: torch.dtype, ties: bool, seed: int
) -> None:
    pattern = unstructured(sparsity, group=group)
    mask = pattern.keep(random_scores(rows, columns, seed=seed, dtype=dtype, ties=ties))
    assert pattern.holds(mask)
    if group == "row":
        assert ((~mask).sum(1) == math.floor(sparsity * columns)).all()
    else:
        assert int((~mask).sum()) == math.floor(sparsity * rows * columns)


@given(
    rows=st.integers(1, 5),
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    sparsity=sparsities,
    group=st.sampled_from(["row", "layer"]),
    seed=st.integers(0, 2**31),
)
def test_choosing_part_by_part_keeps_as_many(
    rows: int, cuts: list[int], sparsity: Fraction, group: str, seed: int
) -> None:
    pattern = unstructured(sparsity, group=group)
    scores = random_scores(rows, sum(cuts), seed=seed, dtype=torch.float32, ties=False)
    starts = [sum(cuts[:index]) for index in range(len(cuts))]
    parts = [pattern.keep(scores[:, s : s + width], first=s) for s, width in zip(starts, cuts, strict=True)]
    assert pattern.holds(torch.cat(parts, dim=1))


@given(rows=st.integers(1, 12), columns=st.integers(1, 80), sparsity=sparsities, seed=st.integers(0, 2**31))
def test_cumulative_takes_the_same_share_of_each_rows_total(
    rows: int, columns: int, sparsity: Fraction, seed: int
) -> None:
    scores = random_scores(rows, columns, seed=seed, dtype=torch.float32, ties=False)
    mask = Cumulative(sparsity).keep(scores)
    taken, with_next = [], []
    for row, kept in zip(scores.tolist(), mask.tolist(), strict=True):
        dropped = [score for score, bit in zip(row, kept, strict=True) if not bit]
        stay = [score for score, bit in zip(row, kept, strict=True) if bit]
        assert not dropped or not stay or max(dropped) <= min(stay)
        taken.append(sum(dropped) / sum(row))
        with_next.append((sum(dropped) + min(stay, default=float("inf"))) / sum(row))
    # There is one share alpha that no row exceeds, and that every row would exceed by its next weight.
    assert max(taken) <= min(with_next) + 1e-5
    assert mask.any(1).all()


@pytest.mark.parametrize("share", ["0.003", "0.01", "0.3", "0.5", "0.7", "0.93", "0.97", "0.99"])
def test_cumulative_comes_near_its_target(share: str) -> None:
    scores = random_scores(64, 256, seed=0, dtype=torch.float32, ties=False)
    mask = Cumulative(exact(share)).keep(scores)
    assert float((~mask).float().mean()) == pytest.approx(float(share), abs=CUMULATIVE_TOLERANCE)
    assert len((~mask).sum(1).unique()) > 1


def test_cumulative_keeps_a_weight_of_each_row_beyond_what_rows_can_lose() -> None:
    scores = random_scores(48, 24, seed=0, dtype=torch.float32, ties=False)
    mask = Cumulative(exact("0.99")).keep(scores)
    assert torch.equal(mask, scores == scores.amax(1, keepdim=True))


def test_ties_go_as_in_topk() -> None:
    scores = random_scores(16, 64, seed=0, dtype=torch.float32, ties=True)
    dropped = scores.topk(32, dim=1, largest=False).indices
    assert torch.equal(PerRow(Fraction(1, 2)).keep(scores), torch.ones(16, 64).scatter(1, dropped, 0).bool())
    groups = scores.view(16, -1, 4)
    dropped = groups.topk(2, dim=-1, largest=False).indices
    expected = torch.ones_like(groups).scatter(-1, dropped, 0).bool().view(16, 64)
    assert torch.equal(KeptOf(2, 4).keep(scores), expected)


def test_shares_are_taken_as_they_are_written() -> None:
    assert int(100 * 0.29) == 28
    assert int((~PerRow(exact(0.29)).keep(torch.rand(1, 100))).sum()) == 29


@pytest.mark.parametrize("text", ["2:4", "1:4", "7:16", "row 0.5", "layer 0.29", "cumulative 0.001", "row 1e-05"])
def test_patterns_are_read_as_they_print(text: str) -> None:
    assert str(pattern_of(text)) == text


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:", "2", "half", "row", "row 1.5", "rows 0.5", ""])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(ShearingError, match="N kept of each M"):
        pattern_of(text)


def test_an_m_that_does_not_divide() -> None:
    with pytest.raises(ShearingError) as caught:
        KeptOf(2, 8).check(rows=4, columns=36, name="model.layers.0.mlp.up_proj.weight")
    assert "2 kept of 8" in str(caught.value)
    assert "36 inputs of model.layers.0.mlp.up_proj.weight: 2, 3, 4, 6, 9, 12, 18" in str(caught.value)


def test_masks_that_do_not_hold() -> None:
    mask = KeptOf(2, 4).keep(torch.rand(4, 8))
    mask[1, 4:] = torch.tensor([True, True, True, False])
    assert not KeptOf(2, 4).holds(mask)
    assert not KeptOf(3, 5).holds(mask)
    assert not PerRow(Fraction(1, 2)).holds(mask)
    assert not PerLayer(Fraction(1, 2)).holds(mask)
