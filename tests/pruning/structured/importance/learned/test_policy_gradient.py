"""Chances to be kept, from the losses of masks."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from shearing.data.documents import Inputs
from shearing.errors import ShearingError
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import Granularity
from shearing.pruning.structured.importance.learned import policy_gradient
from shearing.pruning.structured.importance.learned.policy_gradient import (
    PolicyGradient,
    initial_chances,
    leave_one_out_gradient,
)
from shearing.pruning.structured.importance.metric import Evidence
from tests.models.tiny import tiny_ids, tiny_model
from tests.models.trained import counting, trained_model


@pytest.mark.parametrize("interaction", [0.0, 0.7])
def test_the_mean_over_all_pairs_of_masks_is_the_gradient_of_the_expected_loss(interaction: float) -> None:
    """On a toy loss Σ c m, and one where two units stand in for each other: c is what comes out, exactly."""
    c = torch.tensor([0.3, -1.0, 0.05, 2.0], dtype=torch.float64)
    s = torch.tensor([0.2, 0.5, 0.9, 0.02], dtype=torch.float64, requires_grad=True)
    masks = [torch.tensor(bits, dtype=torch.float64) for bits in itertools.product((0.0, 1.0), repeat=4)]

    def loss(m: torch.Tensor) -> torch.Tensor:
        return 5.0 + c @ m + interaction * m[0] * m[2]

    def chance(m: torch.Tensor) -> torch.Tensor:
        return torch.where(m > 0, s, 1 - s).prod()

    (expected,) = torch.autograd.grad(sum(chance(m) * loss(m) for m in masks), s)
    with torch.no_grad():
        mean = sum(
            chance(a) * chance(b) * leave_one_out_gradient(s, masks=(a, b), losses=(float(loss(a)), float(loss(b))))
            for a, b in itertools.product(masks, masks)
        )
    torch.testing.assert_close(mean, expected)
    if interaction == 0.0:
        torch.testing.assert_close(expected, c)


def test_a_unit_that_is_decided_has_no_gradient() -> None:
    s = torch.tensor([0.0, 1.0], dtype=torch.float64)
    gradient = leave_one_out_gradient(s, masks=(s, s), losses=(1.0, 2.0))
    assert gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("keep", [1, 7, 10])
def test_chances_begin_in_the_order_of_the_scores_at_the_targets_number_of_units(keep: int) -> None:
    scores = torch.randn(3, 10, generator=torch.Generator().manual_seed(keep))
    chances = initial_chances(scores, granularity=Granularity("intermediate", (3, 10), keep))
    wanted = torch.full((3,), float(keep), dtype=torch.float64)
    torch.testing.assert_close(chances.sum(-1), wanted, atol=0.11 if keep == 10 else 1e-9, rtol=0.0)
    assert torch.equal(chances.argsort(-1), scores.argsort(-1)) or keep != 7
    assert (chances > 0).all()


def test_no_row_ever_expects_more_than_the_target_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    projected = policy_gradient.at_most

    def watched(values: torch.Tensor, *, total: float, low: float, high: float) -> torch.Tensor:
        result = projected(values, total=total, low=low, high=high)
        seen.append((float(result.sum(-1).max()), total))
        return result

    monkeypatch.setattr(policy_gradient, "at_most", watched)
    model = tiny_model()
    target = dataclasses.replace(Shape.of(model.config), num_hidden_layers=3, intermediate_size=20, hidden_size=24)
    PolicyGradient(epochs=10, rate=1.0).scores(model, evidence=Evidence(text=[Inputs(tiny_ids())], target=target))
    assert len(seen) == 10 * 3
    assert all(most <= total + 1e-6 for most, total in seen)


def test_it_finds_the_layer_that_matters_from_chance() -> None:
    """The first layer reads in which steps the text counts: nothing else costs half as much."""
    model = trained_model()
    target = dataclasses.replace(Shape.of(model.config), num_hidden_layers=3)
    text = [Inputs(counting(sequences=8, seed=2_000 + seed)) for seed in range(4)]
    for seed in range(3):
        evidence = Evidence(text=text, target=target, seed=seed)
        scores = PolicyGradient(epochs=13, rate=0.1, start="random").scores(model, evidence=evidence)
        assert 0 in scores["layers"].topk(3).indices.tolist()


def test_it_goes_by_the_seed_alone() -> None:
    evidence = [Evidence(text=[Inputs(tiny_ids())], seed=seed) for seed in (0, 0, 1)]
    first, again, other = (PolicyGradient(rate=0.5).scores(tiny_model(), evidence=each) for each in evidence)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_losses_that_are_no_numbers_end_in_one_error_and_the_model_as_it_was() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ShearingError, match="initial_masks"):
        PolicyGradient().scores(model, evidence=Evidence(text=[Inputs(tiny_ids())]))
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
