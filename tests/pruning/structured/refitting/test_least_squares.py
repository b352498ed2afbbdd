"""Least squares from sums, against those of all rows at once; a ridge that held-out rows choose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shearing.processes.processes import Processes
from shearing.pruning.structured.refitting.least_squares import LEAST_ROWS, RIDGES, Fit, held_out


def test_the_intercept_and_the_weights_are_the_least_squares_of_inputs_beside_a_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 50, 6, generator=generator) + 3.0
    lacks = x @ torch.randn(6, 3, generator=generator) + torch.randn(4, 50, 3, generator=generator) + 2.0
    weights = torch.rand(4, 50, generator=generator)
    columns = torch.tensor([0, 2, 3, 5])
    fit = Fit(torch.zeros(3, 6), columns=columns, outputs=3, ridge=0.3, intercept=True)
    fit.add(x, lacks=lacks, weights=weights)
    correction, intercept, _ = fit.solve(Processes())
    beside_one = torch.cat([x[..., columns], torch.ones(4, 50, 1)], -1).flatten(0, 1).double()
    weighted = beside_one * weights.flatten()[:, None]
    normal = weighted.T @ beside_one
    normal += 0.3 * torch.diag(torch.cat([normal.diagonal()[:4], torch.zeros(1)]))
    wanted = torch.linalg.solve(normal, weighted.T @ lacks.flatten(0, 1).double())
    torch.testing.assert_close(correction, wanted[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(intercept, wanted[4], rtol=1e-4, atol=1e-4)


def _solved(x: Tensor, y: Tensor, weights: Tensor, *, ridge: float, intercept: bool) -> Tensor:
    """Coefficients of rows [T, I], with a last one for a constant if there is one."""
    normal = (x * weights[:, None]).T @ x
    held = normal.diagonal().clone()
    if intercept:
        held[-1] = 0.0
    return torch.linalg.solve(normal + ridge * held.diag(), (x * weights[:, None]).T @ y)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("noise", [0.1, 3.0, 30.0])
def test_the_ridge_is_the_one_that_leaves_least_on_held_out_rows(noise: float, intercept: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, 30, generator=generator, dtype=torch.float64) + 0.5
    y = x @ torch.randn(30, 3, generator=generator, dtype=torch.float64) + 2.0
    y += noise * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    weights = torch.rand(20, 4, generator=generator, dtype=torch.float64)
    held = held_out(range(20))
    fit = Fit(torch.zeros(3, 30), columns=None, outputs=3, ridge="auto", intercept=intercept)
    for rows in (slice(0, 7), slice(7, 20)):
        fit.add(x[rows].float(), lacks=y[rows].float(), weights=weights[rows].float(), held=held[rows])
    correction, constant, ridge = fit.solve(Processes())

    read = torch.cat([x, torch.ones(20, 4, 1)], -1) if intercept else x

    def flat(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return read[rows].flatten(0, 1), y[rows].flatten(0, 1), weights[rows].flatten()

    def left(ridge: float) -> float:
        coefficients = _solved(*flat(~held), ridge=ridge, intercept=intercept)
        of_held, wanted, counts = flat(held)
        return float((counts[:, None] * (wanted - of_held @ coefficients) ** 2).sum())

    assert ridge == min(RIDGES, key=left)
    expected = _solved(*flat(torch.ones(20, dtype=torch.bool)), ridge=ridge, intercept=intercept)
    torch.testing.assert_close(correction, expected[:30], rtol=1e-3, atol=1e-4)
    if constant is not None:
        torch.testing.assert_close(constant, expected[30], rtol=1e-3, atol=1e-3)


def test_rows_that_are_held_out_are_spread_over_any_number_of_domains_in_turn() -> None:
    assert not held_out(range(LEAST_ROWS - 1)).any()
    assert held_out(range(LEAST_ROWS)).any()
    rows = held_out(range(600))
    assert torch.equal(held_out(range(250, 300)), rows[250:300])
    for domains in range(1, 13):
        shares = [float(rows[domain::domains].float().mean()) for domain in range(domains)]
        assert shares == pytest.approx([0.2] * domains, abs=0.07)
