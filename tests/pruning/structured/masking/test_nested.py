"""Nested sizes: one order of the units, turns that are dealt by weight, and each size what it is when it is cut out."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given, strategies as st

from shearing.models.cutting import Selection, compact
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import unit_sizes
from shearing.pruning.structured.masking.nested import BLOCK, NestedMasking, nested_masks, size_of_draw
from shearing.pruning.structured.masking.recipe import WHOLE
from tests.models.tiny import tiny_ids, tiny_model

STEPS_DOWN: dict[str, dict[str, int]] = {
    "medium": {"num_hidden_layers": 3, "intermediate_size": 32, "num_attention_heads": 3, "num_key_value_heads": 3},
    "small": {"hidden_size": 24, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2},
}
"""Of the tiny models: layers 4, hidden 36, 6 query heads on 3 KV heads, MLP 40."""


def shapes_of(source: Shape) -> dict[str, Shape]:
    shapes, shape = {}, source
    for name, smaller in STEPS_DOWN.items():
        shapes[name] = shape = dataclasses.replace(shape, **smaller)
    return shapes


def scores_of(source: Shape, *, seed: int, levels: int | None = None) -> dict[str, torch.Tensor]:
    """By chance; of few levels many are equal."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(size, generator=generator) for name, size in unit_sizes(source).items()}
    return scores if levels is None else {name: (value * levels).floor() for name, value in scores.items()}


def nested(*, draws: int = 1) -> NestedMasking:
    model = tiny_model(tied=False)
    source = Shape.of(model.config)
    shapes = shapes_of(source)
    masks = nested_masks(scores_of(source, seed=3), source=source, shapes=shapes)
    weights = {WHOLE: 2.0, "medium": 1.0, "small": 1.0}
    return NestedMasking(MaskedModel(model), masks, shapes=shapes, weights=weights, draws=draws, seed=5)


@given(st.integers(0, 10**6), st.sampled_from([None, 3]))
def test_what_a_smaller_size_keeps_the_larger_ones_keep(seed: int, levels: int | None) -> None:
    source = Shape.of(tiny_model().config)
    shapes = shapes_of(source)
    found = nested_masks(scores_of(source, seed=seed, levels=levels), source=source, shapes=shapes)
    for name, mask in found["small"].items():
        larger = found["medium"].get(name, torch.ones_like(mask))
        assert bool((mask <= larger).all()), name
    for name, shape in shapes.items():
        assert Selection.of(Masks(**found[name]), source=source, target=shape).shape(source) == shape


@given(st.lists(st.floats(0.01, 10.0), min_size=2, max_size=5), st.integers(0, 1000), st.integers(0, 50))
def test_sizes_have_their_share_of_every_block(weights: list[float], seed: int, block: int) -> None:
    drawn = Counter(size_of_draw(block * BLOCK + place, weights=weights, seed=seed) for place in range(BLOCK))
    for index, weight in enumerate(weights):
        assert abs(drawn[index] - BLOCK * weight / sum(weights)) < 1 + 1e-6


def test_a_share_below_one_of_a_block_is_met_over_many() -> None:
    weights = [1.0, 0.005]
    drawn = [size_of_draw(draw, weights=weights, seed=1) for draw in range(400 * BLOCK)]
    assert sum(drawn) / len(drawn) == pytest.approx(0.005 / 1.005, rel=0.2)
    # The order is by chance: neighbours do not follow from each other.
    halves = torch.tensor([size_of_draw(draw, weights=[1.0, 1.0], seed=2) for draw in range(200 * BLOCK)]).double()
    changes = (halves[1:] != halves[:-1]).double().mean()
    assert float(changes) == pytest.approx(0.5, abs=0.03)


NARROWER = {"num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 16}
FEWER_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("name", "tied", "smaller"),
    [
        ("llama", False, {**NARROWER, **FEWER_HEADS}),
        ("llama", True, {**NARROWER, **FEWER_HEADS}),
        ("llama-biases", False, {**NARROWER, **FEWER_HEADS}),
        ("qwen3", True, {**NARROWER, **FEWER_HEADS}),
        ("gemma2", True, NARROWER),
        ("gpt_neox", False, {"num_hidden_layers": 3, "intermediate_size": 16}),
    ],
)
@torch.no_grad()
def test_a_size_computes_what_its_own_model_does(name: str, tied: bool, smaller: dict[str, int]) -> None:
    model = tiny_model(name, tied=tied)
    source = Shape.of(model.config)
    shapes = {"small": dataclasses.replace(source, **smaller)}
    masks = nested_masks(scores_of(source, seed=3), source=source, shapes=shapes)
    subject = NestedMasking(MaskedModel(model), masks, shapes=shapes, weights={WHOLE: 1.0, "small": 1.0})
    ids = tiny_ids()
    whole = subject.model.model(ids).logits.clone()
    kept = subject.masks_of("small")
    assert kept is not None
    subject.model.set_masks(kept)
    masked = subject.model.model(ids).logits.double()
    subject.settle(step=0)
    assert subject.model.model(ids).logits.equal(whole)
    selection = Selection.of(kept, source=source, target=shapes["small"])
    cut = compact(subject.model.release(), masks=kept, selection=selection)(ids).logits.double()
    assert Shape.of(model.config) == source
    assert float((cut - masked).norm() / masked.norm()) < 1e-5


def test_a_step_of_a_size_has_the_gradients_of_its_own_model() -> None:
    """Where it has the weights; what is left out has none, so that their squares have one sum."""
    subject = nested()
    kept = subject.masks_of("small")
    assert kept is not None
    shapes = shapes_of(Shape.of(subject.model.model.config))
    source = Shape.of(subject.model.model.config)
    selection = Selection.of(kept, source=source, target=shapes["small"])
    subject.model.set_masks(kept)
    ids = tiny_ids()
    subject.model.model(ids, labels=ids).loss.backward()
    found = sum(float(weight.grad.double().square().sum()) for weight in subject.model.model.parameters())  # type: ignore[union-attr]
    alone = compact(subject.model.release(), masks=kept, selection=selection)
    alone(ids, labels=ids).loss.backward()
    expected = sum(float(weight.grad.double().square().sum()) for weight in alone.parameters())  # type: ignore[union-attr]
    assert found == pytest.approx(expected, rel=1e-5)


def test_shares_of_a_batch_train_what_their_draw_says() -> None:
    subject = nested(draws=2)
    names = [subject.size_at(step=step, draw=draw) for step in range(40) for draw in range(2)]
    assert set(names) == {WHOLE, "medium", "small"}
    for step in range(40):
        for sequence in range(4):
            subject.draw(step=step, sequence=sequence, of=4)
            wanted = subject.masks_of(names[2 * step + sequence // 2])
            held = subject.model.masks.tensors()
            assert held.keys() == ({} if wanted is None else wanted.tensors()).keys()
            assert wanted is None or all(held[name].equal(mask) for name, mask in wanted.tensors().items())
        shares = {name: float(value) for name, value in subject.metrics(step=step).items()}
        assert shares == {f"size/{name}": names[2 * step : 2 * step + 2].count(name) / 2 for name in subject.sizes}


def test_a_checkpoint_brings_the_masks_back() -> None:
    subject, other = nested(), nested()
    state = subject.state_dict()
    flipped = {"masks": {name: {k: 1 - v for k, v in masks.items()} for name, masks in state["masks"].items()}}
    other.load_state_dict(flipped)
    other.load_state_dict(state)
    for name in ("medium", "small"):
        mine, its = subject.masks_of(name), other.masks_of(name)
        assert mine is not None
        assert its is not None
        assert all(mask.equal(its.tensors()[unit]) for unit, mask in mine.tensors().items())
    whole, small = subject.settled_parameters(step=0), shapes_of(Shape.of(subject.model.model.config))
    expected = (2 * whole + sum(shape.num_parameters() for shape in small.values())) / 4
    assert subject.expected_parameters(step=0) == pytest.approx(expected)
