"""SparseGPT equals Optimal Brain Surgeon with every inverse computed anew, and errs less than Wanda."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shearing.pruning.sparse.criteria import criteria
from shearing.pruning.sparse.patterns import KeptOf, Pattern, PerLayer, PerRow
from shearing.pruning.sparse.reconstruction import obs, reconstructions
from shearing.pruning.sparse.reconstruction.reconstruction import Choice
from tests.pruning.sparse import oracle
from tests.pruning.sparse.test_criteria import HALF, sample, statistics_of

BLOCK = 16
CASES: list[tuple[Pattern, int, Callable[[Tensor], Tensor]]] = [
    (KeptOf(2, 4), 4, lambda scores: oracle.mask_kept_of(scores, kept=2, of=4)),
    (KeptOf(4, 8), 8, lambda scores: oracle.mask_kept_of(scores, kept=4, of=8)),
    (KeptOf(1, 4), 4, lambda scores: oracle.mask_kept_of(scores, kept=1, of=4)),
    (KeptOf(5, 12), 12, lambda scores: oracle.mask_kept_of(scores, kept=5, of=12)),
    (KeptOf(7, 24), 24, lambda scores: oracle.mask_kept_of(scores, kept=7, of=24)),
    (PerLayer(HALF), BLOCK, lambda scores: oracle.mask_per_layer(scores, sparsity=0.5)),
    (PerRow(HALF), BLOCK, lambda scores: oracle.mask_per_row(scores, sparsity=0.5)),
]


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obs, "BLOCK_COLUMNS", BLOCK)


@pytest.mark.parametrize(("pattern", "groups", "choose"), CASES, ids=[str(case[0]) for case in CASES])
@pytest.mark.parametrize("dead", [(), (0, 17, 18)])
@pytest.mark.usefixtures("_small_blocks")
def test_sparsegpt_is_the_papers(
    pattern: Pattern, groups: int, choose: Callable[[Tensor], Tensor], dead: tuple[int, ...]
) -> None:
    weight, inputs = sample(rows=6, columns=48, seed=1)
    inputs[..., list(dead)] = 0.0
    if dead:
        # Scores of dead inputs are all zero: that is a tie, which the oracle has no rule for.
        choose_distinct = choose
        choose = lambda scores: choose_distinct(scores + 1e-12 * torch.arange(scores.numel()).view(scores.shape))  # noqa: E731
    expected, mask = oracle.sparsegpt(weight, oracle.hessian(inputs), choose, groups=groups)
    way = reconstructions()["obs"]
    found, found_mask = way.prune(weight, choice=Choice(criteria()["sparsegpt"], pattern, statistics_of(inputs)))
    alive = [j for j in range(48) if j not in dead]
    assert torch.equal(found_mask[:, alive], mask[:, alive])
    assert pattern.holds(found_mask)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-4)
    assert bool((found[:, list(dead)] == 0).all())


@pytest.mark.parametrize("name", ["wanda", "magnitude"])
@pytest.mark.usefixtures("_small_blocks")
def test_a_mask_that_was_chosen_before(name: str) -> None:
    weight, inputs = sample(rows=6, columns=40)
    statistics, pattern = statistics_of(inputs), KeptOf(2, 4)
    choice = Choice(criteria()[name], pattern, statistics)
    mask = choice.mask(weight)
    expected, _ = oracle.sparsegpt(weight, oracle.hessian(inputs), None, groups=1, mask=mask)
    found, found_mask = reconstructions()["obs"].prune(weight, choice=choice)
    assert torch.equal(found_mask, mask)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-4)
    none, _ = reconstructions()["none"].prune(weight, choice=choice)
    assert oracle.output_error(weight, found, inputs) < oracle.output_error(weight, none, inputs)


@pytest.mark.parametrize("pattern", [KeptOf(2, 4), KeptOf(4, 8), PerLayer(HALF), PerRow(HALF)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_it_errs_less_than_wanda_on_the_same_inputs(pattern: Pattern, seed: int) -> None:
    weight, inputs = sample(rows=32, columns=64, seed=seed)
    statistics = statistics_of(inputs)
    ways = reconstructions()
    ours, _ = ways["obs"].prune(weight, choice=Choice(criteria()["sparsegpt"], pattern, statistics))
    wanda, _ = ways["none"].prune(weight, choice=Choice(criteria()["wanda"], pattern, statistics))
    assert oracle.output_error(weight, ours, inputs) < oracle.output_error(weight, wanda, inputs)


def test_blocks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = sample()
    choice = Choice(criteria()["sparsegpt"], KeptOf(2, 4), statistics_of(inputs))
    found = []
    for columns in (4, 16, 128):
        monkeypatch.setattr(obs, "BLOCK_COLUMNS", columns)
        found.append(reconstructions()["obs"].prune(weight, choice=choice))
    for pruned, mask in found[1:]:
        assert torch.equal(mask, found[0][1])
        torch.testing.assert_close(pruned, found[0][0], rtol=1e-3, atol=1e-4)
