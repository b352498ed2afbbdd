"""Reconstructions equal the papers' formulas in fp64, and have the properties that these promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shearing.pruning.calibration.statistics import InputStatistics
from shearing.pruning.sparse.criteria import criteria
from shearing.pruning.sparse.patterns import Cumulative, KeptOf, Pattern, PerLayer, PerRow
from shearing.pruning.sparse.reconstruction import closed_form, dsnot, reconstructions
from shearing.pruning.sparse.reconstruction.reconstruction import Choice
from tests.pruning.sparse import oracle
from tests.pruning.sparse.test_criteria import HALF, sample, statistics_of

PATTERNS: list[Pattern] = [PerRow(HALF), PerLayer(HALF), Cumulative(HALF), KeptOf(2, 4), KeptOf(4, 8), KeptOf(1, 4)]
REFITS = ("obs", "admm", "admm_gradual", "closed_form", "alps")


def shifted(*, rows: int = 12, columns: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """As `sample`, with inputs whose means are not 0."""
    weight, inputs = sample(rows=rows, columns=columns, seed=seed)
    means = torch.randn(columns, generator=torch.Generator().manual_seed(seed + 100))
    return weight, inputs + inputs.std((0, 1)) * means


def choice_of(inputs: Tensor, pattern: Pattern, *, criterion: str = "wanda") -> Choice:
    return Choice(criteria()[criterion], pattern, statistics_of(inputs))


def prune(way: str, weight: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    return reconstructions()[way].prune(weight, choice=choice)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_dsnot_is_the_papers(pattern: Pattern, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsnot, "ROWS", 5)  # of 12, so that there are several parts
    monkeypatch.setattr(dsnot, "CYCLES_OF", 48)
    weight, inputs = shifted(seed=seed)
    choice = choice_of(inputs, pattern)
    start = choice.mask(weight)
    found, mask = prune("dsnot", weight, choice)
    group = pattern.of if isinstance(pattern, KeptOf) else None
    assert torch.equal(mask, oracle.dsnot(weight, start, inputs, group=group))
    assert torch.equal(found, weight.masked_fill(~mask, 0.0))
    assert torch.equal(mask.sum(1), start.sum(1))
    assert pattern.holds(mask)
    assert not torch.equal(mask, start)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_dsnot_brings_each_output_nearer_to_its_mean(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsnot, "CYCLES_OF", 96)
    weight, inputs = shifted(rows=32, columns=96)
    choice = choice_of(inputs, pattern, criterion="magnitude")
    mean = inputs.flatten(0, 1).double().mean(0)

    def error(mask: Tensor) -> Tensor:
        return ((weight.double() * ~mask) @ mean).abs()

    _, mask = prune("dsnot", weight, choice)
    before, after = error(choice.mask(weight)), error(mask)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.mean()) < 0.3 * float(before.mean())


def test_narrow_rows_exchange_fewer_pairs() -> None:
    assert [dsnot.cycles_of(columns) for columns in (4096, 11008, 2048, 576, 48, 1)] == [50, 50, 25, 8, 1, 1]
    weight, inputs = shifted()
    choice = choice_of(inputs, PerRow(HALF))
    changed = choice.mask(weight) != prune("dsnot", weight, choice)[1]
    assert set(changed.sum(1).tolist()) <= {0, 2}


def test_dsnot_leaves_rows_alone_whose_inputs_have_no_mean() -> None:
    weight, inputs = sample()
    inputs = torch.cat([inputs, -inputs])
    choice = choice_of(inputs, KeptOf(2, 4))
    assert torch.equal(prune("dsnot", weight, choice)[1], choice.mask(weight))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_admm_is_the_papers(pattern: Pattern) -> None:
    weight, inputs = shifted()
    choice = choice_of(inputs, pattern)
    found, mask = prune("admm", weight, choice)
    assert torch.equal(mask, choice.mask(weight))
    expected = oracle.admm(weight, inputs, mask=lambda *_: mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradual_admm_is_the_papers(pattern: Pattern) -> None:
    """With Wanda's criterion, whose scores are sizes where inputs have norm 1."""
    weight, inputs = shifted()
    norms = inputs.flatten(0, 1).double().square().sum(0).sqrt()
    chosen: list[Tensor] = []

    def mask_of(iteration: int, now: Tensor) -> Tensor:
        if iteration >= 15:
            return chosen[-1]
        scores = now.abs() * norms
        mask = pattern.keep(scores.float())
        share = 1 - (1 - (iteration + 1) / 15) ** 3
        for i in range(len(mask)):
            going = sorted((~mask[i]).nonzero().flatten().tolist(), key=lambda j: float(scores[i, j]))
            for j in going[int(len(going) * share) :] if iteration < 14 else ():
                mask[i, j] = True
        chosen.append(mask)
        return mask

    expected = oracle.admm(weight, inputs, mask=mask_of)
    found, mask = prune("admm_gradual", weight, choice_of(inputs, pattern))
    assert pattern.holds(mask)
    assert torch.equal(mask, chosen[-1])
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_several_weights_at_once_is_the_papers(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "CHUNK_ELEMENTS", 5 * 24**2)  # several chunks, rows of unequal number in one
    weight, inputs = shifted()
    choice = choice_of(inputs, pattern)
    found, _ = prune("closed_form", weight, choice)
    expected, losses = oracle.removed_at_once(weight, choice.mask(weight), inputs)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    lost, H = weight.double() - found.double(), oracle.damped(oracle.hessian(inputs))
    torch.testing.assert_close(0.5 * ((lost @ H) * lost).sum(1), losses, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_alps_is_the_papers(pattern: Pattern) -> None:
    weight, inputs = shifted()
    choice = choice_of(inputs, pattern)
    found, mask = prune("alps", weight, choice)
    expected, expected_mask = oracle.alps(
        weight, inputs, first=choice.mask(weight), keep=lambda scores: pattern.keep(scores.float())
    )
    assert pattern.holds(mask)
    assert torch.equal(mask, expected_mask)
    # Ten steps of conjugate gradients come this near to the optimum.
    error, optimum = (oracle.output_error(weight, each, inputs) for each in (found, expected))
    assert error < 1.05 * optimum


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("criterion", ["wanda", "magnitude"])
def test_what_each_leaves_of_the_error(pattern: Pattern, criterion: str) -> None:
    """The optimum for a mask is below ADMM's, that below column by column, that below none; searched masks, below."""
    weight, inputs = sample(rows=32, columns=96, seed=5)
    choice = choice_of(inputs, pattern, criterion=criterion)
    H = oracle.damped(oracle.hessian(inputs))
    found = {way: prune(way, weight, choice)[0].double() for way in ("none", *REFITS)}
    damped = {way: float((((weight - each) @ H) * (weight - each)).sum()) for way, each in found.items()}
    errors = {way: oracle.output_error(weight, each, inputs) for way, each in found.items()}
    assert damped["closed_form"] == min(damped[way] for way in ("none", "obs", "admm", "closed_form"))
    assert errors["admm"] < errors["obs"] < errors["none"]
    assert errors["alps"] < errors["closed_form"]


@pytest.mark.parametrize("way", ["admm", "closed_form"])
def test_a_mask_of_ones_and_inputs_that_know_nothing_of_each_other(way: str) -> None:
    weight, inputs = sample(rows=4, columns=16)
    everything, _ = prune(way, weight, choice_of(inputs, KeptOf(4, 4)))
    torch.testing.assert_close(everything, weight, rtol=1e-3, atol=1e-4)
    apart = torch.diag(torch.arange(1.0, 17.0))[None]
    found, mask = prune(way, weight, choice_of(apart, KeptOf(2, 4)))
    torch.testing.assert_close(found, weight * mask, rtol=1e-4, atol=1e-5)


def test_of_two_equal_inputs_one_takes_over_both() -> None:
    """To 2 / (1 + 0.1 / 2): 1.91 at ADMM's damping; at 0.01, which the closed form and ALPS have, to 1.99."""
    inputs = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0))
    inputs[..., 1] = inputs[..., 0]
    weight = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, False, True, False]])

    class Given(Choice):
        def mask(self, weight: Tensor, *, first: int = 0) -> Tensor:
            return mask

    choice = Given(criteria()["wanda"], KeptOf(1, 2), statistics_of(inputs, parts=1))
    assert float(prune("admm", weight, choice)[0][0, 0]) == pytest.approx(1.91, abs=0.03)
    assert float(prune("closed_form", weight, choice)[0][0, 0]) == pytest.approx(1.99, abs=0.01)


@pytest.mark.parametrize("way", reconstructions())
@pytest.mark.parametrize("pattern", [PerRow(HALF), KeptOf(2, 4)], ids=str)
def test_inputs_that_are_always_zero(way: str, pattern: Pattern) -> None:
    weight, inputs = sample(rows=8, columns=32)
    inputs[..., [0, 1, 2, 9]] = 0.0
    for criterion in criteria():
        found, mask = prune(way, weight, choice_of(inputs, pattern, criterion=criterion))
        assert pattern.holds(mask)
        assert bool(found.isfinite().all())
        assert bool((found[~mask] == 0).all())


@pytest.mark.parametrize("size", [1.0, 0.02, 0.005])
@pytest.mark.parametrize("way", reconstructions())
@pytest.mark.parametrize("pattern", [PerRow(HALF), KeptOf(2, 4)], ids=str)
def test_weights_of_inputs_that_are_always_zero_go_first(way: str, pattern: Pattern, size: float) -> None:
    weight, inputs = sample(rows=8, columns=32)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[0, 1, 9, 14, 22]] = True  # never more of them than a pattern removes
    inputs = inputs.masked_fill(dead, 0.0) * size
    # Magnitude knows nothing of inputs, and the gradients of this sample are not of its inputs.
    for criterion in sorted(criteria().keys() - {"magnitude", "gblm"}):
        _, mask = prune(way, weight, choice_of(inputs, pattern, criterion=criterion))
        assert not bool(mask[:, dead].any()), criterion


@pytest.mark.parametrize("way", ["admm", "admm_gradual", "closed_form", "alps", "dsnot"])
def test_neither_the_weight_nor_the_statistics_are_changed(way: str) -> None:
    """Query, key and value are pruned one after the other by the same statistics."""
    weight, inputs = shifted()
    choice = choice_of(inputs, KeptOf(2, 4))
    before, products = weight.clone(), choice.statistics.products.clone()  # type: ignore[union-attr]
    first = prune(way, weight, choice)
    again = prune(way, weight, choice)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert torch.equal(weight, before)
    assert isinstance(choice.statistics, InputStatistics)
    assert torch.equal(choice.statistics.products, products)
