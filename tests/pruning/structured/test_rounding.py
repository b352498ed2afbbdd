"""Rounding: exactly the target, in every row, and layers an ordinary config can hold."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.chance import random_scores
from shearing.pruning.structured.rounding import alternating, select, select_across_layers, top_k
from tests.models.tiny import tiny_ids, tiny_model


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


def parameters_under(masks: Masks, *, source: Shape, hidden: int) -> int:
    """Parameters of the heads and units that masks leave, counted weight by weight, for a plain Llama."""
    total, G = 0, source.query_heads_per_group
    for layer in range(source.num_hidden_layers):
        if masks.mlp is not None and not masks.mlp[layer]:
            continue
        units = source.intermediate_size if masks.intermediate is None else int(masks.intermediate[layer].sum())
        groups = torch.ones(source.num_key_value_heads) if masks.kv_groups is None else masks.kv_groups[layer]
        heads = torch.ones(len(groups), G) if masks.query_heads is None else masks.query_heads[layer]
        total += 3 * units * hidden + 2 * int(groups.sum()) * source.head_dim * hidden
        total += 2 * int((heads * groups[:, None]).sum()) * source.head_dim * hidden
    return total


@pytest.mark.parametrize(
    "sizes",
    [
        {"intermediate_size": 20},
        {"num_attention_heads": 3},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 17},
        {"num_attention_heads": 2, "num_key_value_heads": 2},
        {"num_attention_heads": 3, "intermediate_size": 33, "num_hidden_layers": 3, "hidden_size": 30},
    ],
)
def test_across_layers_the_best_stay_as_long_as_the_parameters_of_the_target_last(sizes: dict[str, int]) -> None:
    source = Shape.of(tiny_model("llama").config)
    target = dataclasses.replace(source, **sizes)
    scores = random_scores(source, seed=1)
    scores["intermediate"] *= torch.tensor([0.2, 1.0, 3.0, 0.0])[:, None]
    masks = select_across_layers(scores, source=source, target=target)
    uniform, _ = select(scores, source=source, target=target)
    for name in ("hidden", "attention", "mlp"):
        mine, other = getattr(masks, name), getattr(uniform, name)
        assert (mine is None and other is None) or torch.equal(mine, other)
    wanted = parameters_under(uniform, source=source, hidden=target.hidden_size)
    left = wanted - parameters_under(masks, source=source, hidden=target.hidden_size)
    smallest = 3 if "intermediate_size" in sizes else 2 * source.head_dim * (2 if "num_key_value_heads" in sizes else 1)
    assert 0 <= left < smallest * target.hidden_size
    if "intermediate_size" in sizes:
        kept, mask = torch.ones(4) if masks.mlp is None else masks.mlp, masks.intermediate
        assert mask is not None
        stays = (mask > 0) & (kept > 0)[:, None]
        goes = (mask == 0) & (kept > 0)[:, None]
        others = stays & (top_k(scores["intermediate"], keep=1) == 0)
        assert scores["intermediate"][goes].max() < scores["intermediate"][others].min()
        assert (stays.sum(1)[kept > 0] >= 1).all()
        assert len(stays.sum(1).unique()) > 1


def test_what_is_selected_across_layers_can_be_computed_with() -> None:
    model = tiny_model("llama")
    source = Shape.of(model.config)
    target = dataclasses.replace(source, num_attention_heads=3, intermediate_size=10, num_hidden_layers=3)
    subject = MaskedModel(model)
    subject.set_masks(select_across_layers(random_scores(source, seed=0), source=source, target=target))
    with torch.no_grad():
        assert subject(tiny_ids()).isfinite().all()


def test_a_target_that_is_the_source_leaves_everything() -> None:
    source = Shape.of(tiny_model("llama").config)
    masks = select_across_layers(random_scores(source, seed=0), source=source, target=source)
    assert masks.tensors() == {}


def test_the_hash_of_a_selection_is_that_of_its_units():
    source = Shape.of(tiny_model().config)
    target = dataclasses.replace(source, num_hidden_layers=2, hidden_size=24, intermediate_size=16)
    scores = random_scores(source, seed=1)
    _, first = select(scores, source=source, target=target)
    _, same = select({name: 3 * values + 1 for name, values in scores.items()}, source=source, target=target)
    assert first.digest == same.digest
    assert len(first.digest) == 8
    others = {select(random_scores(source, seed=seed), source=source, target=target)[1].digest for seed in range(2, 9)}
    assert len(others | {first.digest}) == 8
    moved = first.hidden.clone()
    moved[-1] = next(unit for unit in range(source.hidden_size) if unit not in moved)
    assert dataclasses.replace(first, hidden=moved.sort().values).digest != first.digest
