"""Statistics equal direct computation, and masks the ones written from the papers, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product

import pytest
import torch
from torch import Tensor

from shearing.errors import ShearingError
from shearing.pruning.calibration.statistics import InputStatistics
from shearing.pruning.sparse.criteria import criteria
from shearing.pruning.sparse.patterns import Cumulative, KeptOf, Pattern, PerLayer, PerRow
from shearing.pruning.sparse.reconstruction import reconstructions, require_valid
from shearing.pruning.sparse.reconstruction.reconstruction import Choice
from tests.pruning.sparse import oracle

HALF = Fraction(1, 2)
PATTERNS: list[tuple[Pattern, Callable[[Tensor], Tensor]]] = [
    (PerRow(HALF), lambda scores: oracle.mask_per_row(scores, sparsity=0.5)),
    (PerLayer(HALF), lambda scores: oracle.mask_per_layer(scores, sparsity=0.5)),
    (KeptOf(2, 4), lambda scores: oracle.mask_kept_of(scores, kept=2, of=4)),
    (KeptOf(4, 8), lambda scores: oracle.mask_kept_of(scores, kept=4, of=8)),
    (KeptOf(1, 4), lambda scores: oracle.mask_kept_of(scores, kept=1, of=4)),
]


def sample(*, rows: int = 24, columns: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [O, I] and inputs [sequences, tokens, I] of very different size and correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    scale = torch.randn(columns, generator=generator).exp()
    inputs = torch.randn(6, 32, columns, generator=generator) @ mixing * scale
    return torch.randn(rows, columns, generator=generator), inputs


def statistics_of(inputs: Tensor, *, parts: int = 3) -> InputStatistics:
    """Of everything that any criterion needs; gradients are those of one output, and the same for all."""
    columns = inputs.shape[-1]
    statistics = InputStatistics(columns, needs=frozenset({"sums", "squares", "moment"}), device=torch.device("cpu"))
    for part in inputs.split(-(-len(inputs) // parts)):
        statistics.add(part)
    gradients = torch.rand(1, columns, generator=torch.Generator().manual_seed(columns))
    return statistics.with_gradients(gradients, length=inputs.shape[1])


@pytest.mark.parametrize("parts", [1, 2, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_running_means_over_sequences(parts: int, dtype: torch.dtype) -> None:
    _, inputs = sample()
    inputs = inputs.to(dtype)
    statistics = statistics_of(inputs, parts=parts)
    assert statistics.squares.dtype == statistics.moment.dtype == torch.float32
    squares = inputs.double().square().sum((0, 1)) / len(inputs)
    torch.testing.assert_close(statistics.squares.double(), squares, rtol=1e-5, atol=0)
    torch.testing.assert_close(statistics.moment.double(), oracle.hessian(inputs), rtol=1e-4, atol=1e-4)
    assert statistics.is_finite()


def test_the_factor_is_of_the_inverse_of_what_is_left() -> None:
    _, inputs = sample()
    inputs[..., 5] = 0.0
    factor = statistics_of(inputs).factor()
    assert factor.dead.nonzero().flatten().tolist() == [5]
    assert factor.damping == 0.01
    H = oracle.damped(oracle.hessian(inputs))
    for j in range(len(H)):
        expected = torch.linalg.inv(H[j:, j:])[0, 0]
        assert float(factor.upper[j, j]) ** 2 == pytest.approx(float(expected), rel=1e-3)


def test_damping_grows_where_rounding_leaves_no_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    thin = 1e4 * torch.randn(1, 4, 3, generator=generator) @ torch.randn(3, 200, generator=generator)
    statistics = InputStatistics(200, needs=frozenset({"moment"}), device=torch.device("cpu"), damping=1e-9)
    statistics.add(thin)
    factor = statistics.factor()
    assert factor.damping > 1e-9
    assert bool(factor.upper.isfinite().all())


def test_a_moment_that_cannot_be_inverted() -> None:
    statistics = InputStatistics(4, needs=frozenset({"moment"}), device=torch.device("cpu"))
    statistics.add(torch.full((1, 2, 4), float("nan")))
    assert not statistics.is_finite()
    with pytest.raises(ShearingError, match="damping"):
        statistics.factor()


@pytest.mark.parametrize(
    ("pattern", "expected"), PATTERNS, ids=lambda value: str(value) if isinstance(value, Pattern) else ""
)
@pytest.mark.parametrize("seed", range(3))
def test_wanda_masks_are_the_papers(pattern: Pattern, expected: Callable[[Tensor], Tensor], seed: int) -> None:
    weight, inputs = sample(seed=seed)
    choice = Choice(criteria()["wanda"], pattern, statistics_of(inputs))
    assert torch.equal(choice.mask(weight), expected(oracle.wanda_scores(weight, inputs)))


@pytest.mark.parametrize(
    ("pattern", "expected"), PATTERNS, ids=lambda value: str(value) if isinstance(value, Pattern) else ""
)
def test_magnitude_masks_are_the_papers(pattern: Pattern, expected: Callable[[Tensor], Tensor]) -> None:
    weight, _ = sample()
    choice = Choice(criteria()["magnitude"], pattern, None)
    assert torch.equal(choice.mask(weight), expected(oracle.magnitude_scores(weight)))


@pytest.mark.parametrize(
    ("pattern", "expected"), PATTERNS, ids=lambda value: str(value) if isinstance(value, Pattern) else ""
)
@pytest.mark.parametrize("name", ["ria", "isc", "sparsegpt"])
def test_masks_of_further_criteria_are_the_papers(
    name: str, pattern: Pattern, expected: Callable[[Tensor], Tensor]
) -> None:
    weight, inputs = sample(seed=4)
    published = {"ria": oracle.ria_scores, "isc": oracle.isc_scores, "sparsegpt": oracle.sparsegpt_scores}
    scores = published[name](weight, inputs)
    choice = Choice(criteria()[name], pattern, statistics_of(inputs))
    assert torch.equal(choice.mask(weight), expected(scores))


@pytest.mark.parametrize(
    ("pattern", "expected"), PATTERNS, ids=lambda value: str(value) if isinstance(value, Pattern) else ""
)
def test_gblm_masks_are_the_papers(pattern: Pattern, expected: Callable[[Tensor], Tensor]) -> None:
    weight, inputs = sample()
    gradients = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) / 100
    statistics = statistics_of(inputs).with_gradients(gradients, length=1024)
    mask = Choice(criteria()["gblm"], pattern, statistics).mask(weight)
    assert torch.equal(mask, expected(oracle.gblm_scores(weight, inputs, gradients, length=1024)))
    wanda = Choice(criteria()["wanda"], pattern, statistics).mask(weight)
    assert not torch.equal(mask, wanda)
    without = statistics.with_gradients(torch.zeros_like(weight), length=1024)
    assert torch.equal(Choice(criteria()["gblm"], pattern, without).mask(weight), wanda)


def test_isc_lies_between_once_and_twice_wandas_square() -> None:
    weight, inputs = sample()
    statistics = statistics_of(inputs)
    ratio = criteria()["isc"].scores(weight, statistics=statistics) / (weight.square() * statistics.factor().diagonal)
    assert float(ratio.min()) >= 1.0
    assert float(ratio.max()) <= 2.0 * (1 + 1e-5)
    alone = statistics_of(torch.diag(torch.linspace(1.0, 2.0, 48))[None], parts=1)
    isc, wanda = (Choice(criteria()[name], PerRow(HALF), alone) for name in ("isc", "wanda"))
    assert torch.equal(isc.mask(weight), wanda.mask(weight))


def test_wandas_variant() -> None:
    weight, inputs = sample()
    mask = Choice(criteria()["wanda"], Cumulative(HALF), statistics_of(inputs)).mask(weight)
    assert torch.equal(mask, oracle.mask_cumulative(oracle.wanda_scores(weight, inputs), sparsity=0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_fp32_whatever_the_weight(dtype: torch.dtype) -> None:
    weight, inputs = sample()
    for criterion in criteria().values():
        scores = criterion.scores(weight.to(dtype), statistics=statistics_of(inputs))
        assert scores.dtype == torch.float32
        assert bool((scores >= 0).all())


def test_every_combination_that_makes_sense_runs_and_the_other_says_why() -> None:
    weight, inputs = sample()
    statistics = statistics_of(inputs)
    patterns = (PerRow(HALF), PerLayer(HALF), Cumulative(HALF), KeptOf(2, 4), KeptOf(3, 6))
    for criterion, way, pattern in product(criteria().values(), reconstructions().values(), patterns):
        if criterion.name in {"sparsegpt", "isc"} and (way.name, pattern) == ("obs", Cumulative(HALF)):
            with pytest.raises(ShearingError, match="has to see whole rows first"):
                require_valid(criterion, reconstruction=way, pattern=pattern)
            continue
        require_valid(criterion, reconstruction=way, pattern=pattern)
        pruned, mask = way.prune(weight, choice=Choice(criterion, pattern, statistics))
        assert pattern.holds(mask)
        assert bool((pruned[~mask] == 0).all())
        assert pruned.dtype == torch.float32
        if way.name == "none":
            assert torch.equal(pruned[mask], weight[mask])
