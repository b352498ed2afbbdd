"""Statistics are sums that parts of the text add up to, and means of them."""

from __future__ import annotations

import pytest
import torch

from shearing.errors import ShearingError
from shearing.pruning.calibration.inverse import damped_factors
from shearing.pruning.calibration.statistics import InputStatistics, Need

BOTH: frozenset[Need] = frozenset({"squares", "moment"})
INPUTS = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.rand(6, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_weighted_sums_in_double_precision_are_those_of_the_whole_text(parts: int) -> None:
    statistics = InputStatistics(5, needs=BOTH, device=torch.device("cpu"), dtype=torch.float64)
    for inputs, weights in zip(INPUTS.chunk(parts), WEIGHTS.chunk(parts), strict=True):
        statistics.add(inputs, weights=weights)
    weighted = torch.einsum("nsi,nsj,ns->ij", INPUTS.double(), INPUTS.double(), WEIGHTS.double())
    torch.testing.assert_close(statistics.products, weighted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.token_moment, weighted / WEIGHTS.double().sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.squares, weighted.diagonal() / 6, rtol=1e-5, atol=1e-6)
    assert statistics.sequences == 6


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_means_and_variances_over_tokens(weights: torch.Tensor | None) -> None:
    needs: frozenset[Need] = frozenset({"sums", "squares"})
    statistics = InputStatistics(5, needs=needs, device=torch.device("cpu"), dtype=torch.float64)
    for part in range(6):
        of_part = None if weights is None else weights[part : part + 1]
        statistics.add(10.0 + INPUTS[part : part + 1], weights=of_part)
    share = torch.full((6, 8), 1 / 48).double() if weights is None else weights.double() / weights.double().sum()
    inputs = (10.0 + INPUTS).double()
    mean = (share[..., None] * inputs).sum((0, 1))
    torch.testing.assert_close(statistics.mean, mean, rtol=1e-6, atol=0.0)
    variance = (share[..., None] * (inputs - mean).square()).sum((0, 1))
    torch.testing.assert_close(statistics.variance, variance, rtol=1e-4, atol=0.0)


def test_a_variance_is_exact_where_the_mean_is_large() -> None:
    """As the statistics of a layer's places are: fp32 outside, whatever is added up inside."""
    needs: frozenset[Need] = frozenset({"sums", "squares"})
    statistics = InputStatistics(5, needs=needs, device=torch.device("cpu"))
    for part in (1000.0 + INPUTS).split(1):
        statistics.add(part)
    inputs = (1000.0 + INPUTS).double().flatten(0, 1)
    torch.testing.assert_close(statistics.variance, inputs.var(0, correction=0).float(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(statistics.mean, inputs.mean(0).float())
    torch.testing.assert_close(statistics.squares, (inputs.square().sum(0) / 6).float())


def test_unweighted_tokens_count_once() -> None:
    statistics = InputStatistics(5, needs=BOTH, device=torch.device("cpu"))
    statistics.add(INPUTS)
    assert float(statistics.tokens) == 48
    torch.testing.assert_close(statistics.moment, statistics.token_moment.float() * 2 * 8)


def test_damping_of_each_entry_is_its_own_share_and_of_the_mean_the_same_for_all() -> None:
    moment = torch.diag(torch.tensor([1.0, 100.0], dtype=torch.float64))
    for of, expected in (("each", [1.1, 110.0]), ("mean", [1.0 + 5.05, 100.0 + 5.05])):
        lower, used = next(damped_factors(moment.clone(), damping=0.1, of=of))
        assert used == 0.1
        assert (lower @ lower.T).diagonal().tolist() == pytest.approx(expected, rel=1e-6)


def test_an_input_that_is_always_zero_has_a_factor_and_each_further_one_is_damped_more() -> None:
    moment = torch.diag(torch.tensor([0.0, 4.0], dtype=torch.float64))
    factors = damped_factors(moment, damping=0.01, of="each")
    (first, _), (second, used) = next(factors), next(factors)
    assert used == pytest.approx(0.1)
    assert float(first[1, 1]) ** 2 == pytest.approx(4.04)
    assert float(second[1, 1]) ** 2 == pytest.approx(4.4)
    assert float(first[0, 0]) > 0


def test_a_moment_without_a_factor_is_refused() -> None:
    with pytest.raises(ShearingError, match="damping"):
        next(damped_factors(torch.full((3, 3), float("nan")), damping=1.5, of="each"))
