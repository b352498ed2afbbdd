"""Allocators that share the budget out by a formula: each equals the formula in plain loops, and keeps its order.

Legend: U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from rich.console import Console
from transformers import PreTrainedModel

from shearing.errors import ShearingError
from shearing.models.stored.stored_model import open_source
from shearing.pruning.calibration.places import Matrix, matrices_of
from shearing.pruning.calibration.stored_walk import Compute
from shearing.pruning.calibration.text import Calibration
from shearing.pruning.sparse.allocation.allocator import (
    Allocation,
    Allocator,
    Request,
    mean_density,
    patterns_of,
    units_of,
)
from shearing.pruning.sparse.allocation.level_budget import nearest_budget
from shearing.pruning.sparse.allocation.rules import rank as rank_module
from shearing.pruning.sparse.allocation.rules.alpha import Alpha, hill_exponent
from shearing.pruning.sparse.allocation.rules.depth import Depth
from shearing.pruning.sparse.allocation.rules.owl import Owl
from shearing.pruning.sparse.allocation.rules.rank import Rank
from shearing.pruning.sparse.allocation.rules.redundancy import Redundancy, equally_redundant
from shearing.pruning.sparse.allocation.wanted import progression
from shearing.pruning.sparse.criteria import criteria
from shearing.pruning.sparse.patterns import KeptOf, PerRow
from shearing.pruning.sparse.reconstruction import reconstructions
from tests.models.tiny import tiny_ids, tiny_model
from tests.pruning.sparse.oracle import wanda_scores

QUARTERS = [KeptOf(kept, 4) for kept in range(1, 5)]
EIGHTHS = [KeptOf(kept, 8) for kept in range(1, 9)]
TOKENS = tiny_ids(sequences=3, length=20)
SETTINGS: dict[str, Any] = {
    "calibration": Calibration(TOKENS, "random"),
    "criterion": criteria()["wanda"],
    "reconstruction": reconstructions()["none"],
    "damping": 0.01,
    "budget": Fraction(1, 2),
    "levels": QUARTERS,
    "unit": "block",
    "console": Console(file=StringIO()),
}


def request_of(folder: Path, *, model: PreTrainedModel | None = None, **changes: Any) -> Request:
    (model or tiny_model()).save_pretrained(folder / "model")
    source = open_source(str(folder / "model"), revision=None, converted=folder / "converted")
    compute = Compute(torch.device("cpu"), torch.float32, 2, "cpu", folder)
    values = {"source": source, "matrices": matrices_of(source), "compute": compute} | SETTINGS | changes
    return Request(**values)


def planned(matrices: list[Matrix], **changes: Any) -> Request:
    """A request whose model nobody reads."""
    values = {"source": None, "matrices": matrices, "compute": None} | SETTINGS | changes
    return Request(**values)


def alike(count: int) -> list[Matrix]:
    return [Matrix(f"m{index}", index, 8, 48) for index in range(count)]


def densities(allocation: Allocation, request: Request) -> list[float]:
    return [float(allocation.patterns[unit.matrices[0].name].density) for unit in request.units]


def facts(allocation: Allocation, request: Request, name: str) -> list[float]:
    assert list(allocation.facts[name]) == [unit.name for unit in request.units]
    return list(allocation.facts[name].values())


def with_traces(monkeypatch: pytest.MonkeyPatch, trace: Callable[[Matrix], float]) -> None:
    def traces(_: object, *, matrices: list[Matrix], **__: object) -> dict[str, float]:
        return {matrix.name: trace(matrix) for matrix in matrices}

    monkeypatch.setattr(rank_module, "fisher_trace", traces)


def test_depth_is_an_arithmetic_progression() -> None:
    request = planned(alike(5), levels=EIGHTHS)
    allocation = Depth(spread=0.2).allocate(request)
    assert facts(allocation, request, "wanted") == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3])
    assert densities(allocation, request) == [0.75, 0.625, 0.5, 0.375, 0.25]


def test_rank_is_an_arithmetic_progression_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """s_i = (S - a) + rank_i 2a / (U - 1), the most sensitive first."""
    with_traces(monkeypatch, lambda matrix: [3.0, 100.0, 0.5, 1.0][matrix.layer])
    request = planned(alike(4), budget=Fraction(1, 4))
    allocation = Rank(spread=0.15).allocate(request)
    assert facts(allocation, request, "wanted") == pytest.approx([0.3, 0.4, 0.1, 0.2])
    assert facts(allocation, request, "scores") == pytest.approx([t / 384 for t in (3.0, 100.0, 0.5, 1.0)])


def test_rank_goes_by_the_trace_per_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    with_traces(monkeypatch, lambda matrix: {"small": 2.0, "large": 3.0}[matrix.name])
    request = planned([Matrix("large", 0, 8, 48), Matrix("small", 0, 8, 16)], unit="matrix")
    large, small = facts(Rank().allocate(request), request, "wanted")
    assert small > large


@pytest.mark.parametrize("allocator", [Rank(), Depth()])
def test_defaults_mix_eighths(allocator: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    with_traces(monkeypatch, lambda matrix: float(matrix.layer))
    request = planned(alike(12), levels=EIGHTHS)
    assert set(densities(allocator.allocate(request), request)) == {0.375, 0.5, 0.625}


@pytest.mark.parametrize("allocator", [Rank(), Depth(), Owl(), Alpha(), Redundancy()])
def test_one_unit_has_the_budget(allocator: Allocator, tmp_path: Path) -> None:
    request = request_of(tmp_path)
    one = Request(**{**vars(request), "matrices": [matrix for matrix in request.matrices if matrix.layer == 1]})
    allocation = allocator.allocate(one)
    assert set(allocation.patterns.values()) == {KeptOf(2, 4)}
    assert facts(allocation, one, "wanted") == pytest.approx([0.5])


SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=7)


@given(sizes=SIZES, data=st.data())
def test_progressions_mean_the_budget_whatever_the_sizes(sizes: list[int], data: st.DataObject) -> None:
    units = units_of([Matrix(f"m{i}", i, 8, 8 * size) for i, size in enumerate(sizes)], unit="matrix")
    ranks = [float(rank) for rank in data.draw(st.permutations(range(len(sizes))))]
    wanted = progression(ranks, spread=0.2, units=units, budget=Fraction(3, 8))
    weighed = sum(unit.size * density for unit, density in zip(units, wanted, strict=True))
    assert weighed / sum(unit.size for unit in units) == pytest.approx(3 / 8)
    assert [wanted[ranks.index(rank)] for rank in sorted(ranks)] == sorted(wanted, reverse=True)
    if len(sizes) > 1:
        assert max(wanted) - min(wanted) == pytest.approx(0.4)


@given(sizes=SIZES, data=st.data())
def test_budgets_are_exact_whatever_the_sizes(sizes: list[int], data: st.DataObject) -> None:
    matrices = [Matrix(f"m{i}", i, 8, 8 * size) for i, size in enumerate(sizes)]
    traces = data.draw(st.lists(st.floats(0, 1e3), min_size=len(sizes), max_size=len(sizes)))
    choice = [data.draw(st.integers(0, 7)) for _ in sizes]
    units = units_of(matrices, unit="matrix")
    budget = mean_density(patterns_of(units, choice=choice, levels=EIGHTHS), matrices=matrices)
    request = planned(matrices, levels=EIGHTHS, budget=budget, unit="matrix")
    assert nearest_budget(request.units, levels=EIGHTHS, budget=budget) == budget
    with pytest.MonkeyPatch.context() as monkeypatch:
        with_traces(monkeypatch, lambda matrix: traces[matrix.layer])
        for allocator in (Rank(), Depth()):
            assert mean_density(allocator.allocate(request).patterns, matrices=matrices) == budget


@given(data=st.data())
def test_more_sensitive_is_never_sparser(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    traces = data.draw(st.lists(st.floats(0, 1e3), min_size=count, max_size=count))
    spread = data.draw(st.floats(0.01, 0.6))
    budget = Fraction(data.draw(st.integers(count, 8 * count)), 8 * count)
    request = planned(alike(count), levels=EIGHTHS, budget=budget)
    with pytest.MonkeyPatch.context() as monkeypatch:
        with_traces(monkeypatch, lambda matrix: traces[matrix.layer])
        found = densities(Rank(spread=spread).allocate(request), request)
    by_sensitivity = sorted(range(count), key=lambda index: -traces[index])
    kept = [found[index] for index in by_sensitivity]
    assert kept == sorted(kept, reverse=True)
    found = densities(Depth(spread=spread).allocate(request), request)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("unit", ["block", "matrix"])
@pytest.mark.parametrize("allocator", [Rank(), Depth(), Owl(), Alpha(), Redundancy(outlier_ratio=2.0)])
def test_budgets_are_exact_on_a_model(allocator: Allocator, unit: str, tmp_path: Path) -> None:
    request = request_of(tmp_path, unit=unit)
    allocation = allocator.allocate(request)
    assert mean_density(allocation.patterns, matrices=request.matrices) == Fraction(1, 2)
    assert allocation.patterns.keys() == {matrix.name for matrix in request.matrices}
    scores, wanted = (facts(allocation, request, name) for name in ("scores", "wanted"))
    rising = isinstance(allocator, (Rank, Owl, Redundancy))
    assert (
        sorted(wanted)
        == [wanted[index] for index in sorted(range(len(wanted)), key=scores.__getitem__)][:: 1 if rising else -1]
    )


def owl_shares(model: PreTrainedModel, request: Request, *, ratio: float) -> list[float]:
    """Share of outliers of each unit, from whole score matrices in fp64."""
    seen: dict[str, torch.Tensor] = {}
    for matrix in request.matrices:
        name = matrix.name.removesuffix(".weight")
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen.__setitem__(name, arguments[0].detach())
        )
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    shares = []
    for unit in request.units:
        scores = torch.cat(
            [
                wanda_scores(model.get_parameter(name).detach(), seen[name.removesuffix(".weight")]).flatten()
                for name in (matrix.name for matrix in unit.matrices)
            ]
        )
        shares.append(float((scores > ratio * scores.mean()).double().mean()))
    return shares


@pytest.mark.parametrize("unit", ["block", "matrix"])
def test_owl_follows_its_formula(unit: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    with torch.no_grad():  # as random weights have no outliers
        model.model.layers[2].mlp.gate_proj.weight[:2] *= 20
        model.model.layers[1].self_attn.q_proj.weight[:, :1] *= 20
    request = request_of(tmp_path, model=model, unit=unit)
    allocation = Owl(outlier_ratio=4.0, spread=0.2).allocate(request)
    shares = owl_shares(model, request, ratio=4.0)
    assert facts(allocation, request, "scores") == pytest.approx(shares)
    assert max(shares) > min(shares)
    sizes = [unit.size for unit in request.units]
    above = [(share - min(shares)) / (max(shares) - min(shares)) * 2 * 0.2 for share in shares]
    mean = sum(r * size for r, size in zip(above, sizes, strict=True)) / sum(sizes)
    assert facts(allocation, request, "wanted") == pytest.approx([r - mean + 0.5 for r in above])


@pytest.mark.parametrize(
    ("levels", "spread"),
    [
        (EIGHTHS, 0.125),
        (QUARTERS, 0.25),
        ([PerRow(Fraction(removed, 100)) for removed in (40, 45, 50, 55, 60)], 0.08),
        ([KeptOf(2, 4)], 0.08),
    ],
)
def test_owl_spreads_by_a_level_at_least(levels: list[Any], spread: float, tmp_path: Path) -> None:
    request = request_of(tmp_path, levels=levels)
    wanted = facts(Owl(outlier_ratio=2.0).allocate(request), request, "wanted")
    assert max(wanted) - min(wanted) == pytest.approx(2 * spread)


@pytest.mark.parametrize("criterion", ["wanda", "magnitude"])
def test_redundancy_follows_its_formula(criterion: str, tmp_path: Path) -> None:
    """Shares of outliers of the criterion's own scores; where no bound is met, 1 - o / d is the same everywhere."""
    model = tiny_model()
    request = request_of(tmp_path, model=model, criterion=criteria()[criterion], levels=EIGHTHS)
    allocation = Redundancy(outlier_ratio=2.0, spread=0.3).allocate(request)
    if criterion == "wanda":
        shares = owl_shares(model, request, ratio=2.0)
    else:
        sizes = [
            torch.cat([model.get_parameter(matrix.name).detach().double().abs().flatten() for matrix in unit.matrices])
            for unit in request.units
        ]
        shares = [float((of > 2.0 * of.mean()).double().mean()) for of in sizes]
    assert facts(allocation, request, "scores") == pytest.approx(shares)
    wanted = facts(allocation, request, "wanted")
    redundant = [1 - share / density for share, density in zip(shares, wanted, strict=True)]
    assert redundant == pytest.approx([redundant[0]] * len(redundant))
    assert sum(wanted) / len(wanted) == pytest.approx(0.5)


@given(data=st.data(), sizes=SIZES)
def test_equal_redundancy_within_bounds(data: st.DataObject, sizes: list[int]) -> None:
    """What is below its bounds is equally redundant, and a larger budget never takes from anybody."""
    units = units_of([Matrix(f"m{i}", i, 8, 8 * size) for i, size in enumerate(sizes)], unit="matrix")
    shares = data.draw(st.lists(st.floats(1e-4, 0.2), min_size=len(sizes), max_size=len(sizes)))
    budget = data.draw(st.floats(0.2, 0.7))
    found = equally_redundant(shares, spread=0.1, units=units, budget=budget)
    weighed = sum(unit.size * density for unit, density in zip(units, found, strict=True))
    assert weighed / sum(unit.size for unit in units) == pytest.approx(budget)
    assert all(budget - 0.1 - 1e-9 <= density <= budget + 0.1 + 1e-9 for density in found)
    inside = [d / s for d, s in zip(found, shares, strict=True) if abs(d - budget) < 0.1 - 1e-6]
    assert inside == pytest.approx(inside[:1] * len(inside), rel=1e-6)
    more = equally_redundant(shares, spread=0.1, units=units, budget=budget + 0.05)
    assert all(after >= before - 1e-9 for before, after in zip(found, more, strict=True))
    alike = equally_redundant([shares[0]] * len(sizes), spread=0.1, units=units, budget=budget)
    assert alike == pytest.approx([budget] * len(sizes))


def test_no_outliers_is_uniform() -> None:
    units = units_of(alike(3), unit="matrix")
    assert equally_redundant([0.0] * 3, spread=0.1, units=units, budget=0.5) == pytest.approx([0.4] * 3)


def test_the_hill_exponent_of_a_power_law() -> None:
    """Squared singular values at the quantiles of a Pareto distribution of density exponent 3."""
    size = 200
    squared = [(1 - (index + 0.5) / size) ** (-1 / 2) for index in range(size)]
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in (size, size + 40))
    weight = left * torch.tensor(squared).sqrt() @ right[:size]
    assert hill_exponent(weight) == pytest.approx(3.0, rel=0.05)
    assert hill_exponent(7.0 * weight.T) == pytest.approx(hill_exponent(weight), rel=1e-4)


def hill(weight: torch.Tensor) -> float:
    """The estimator in plain loops, the spectrum in fp64."""
    squared = sorted(float(value) for value in torch.linalg.svdvals(weight.double()) ** 2)
    logs = [math.log(value) for value in squared]
    width = (logs[-1] - logs[0]) / 100
    bins = [min(int((log - logs[0]) / width), 99) for log in logs]
    peak = min(set(bins), key=lambda index: (-bins.count(index), index))
    tail = [log for log, index in zip(logs, bins, strict=True) if index >= peak]
    return 1 + len(tail) / (sum(tail) - len(tail) * min(tail))


def test_alpha_follows_its_formula(tmp_path: Path) -> None:
    model = tiny_model()
    request = request_of(tmp_path, model=model)
    allocation = Alpha(epsilon=0.2).allocate(request)
    means = []
    for unit in request.units:
        exponents = [hill(model.get_parameter(matrix.name).detach()) for matrix in unit.matrices]
        means.append(sum(exponents) / len(exponents))
    assert facts(allocation, request, "scores") == pytest.approx(means, rel=1e-3)
    factors = [0.8 + 0.4 * (mean - min(means)) / (max(means) - min(means)) for mean in means]
    scale = 0.5 / (sum(factors) / len(factors))
    assert facts(allocation, request, "wanted") == pytest.approx([1 - scale * factor for factor in factors], abs=1e-3)


def test_alpha_of_a_matrix_without_a_spectrum(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    with pytest.raises(ShearingError, match=r"layers.1.mlp.up_proj.*\n.*a spectrum with a tail"):
        Alpha().allocate(request_of(tmp_path, model=model))


def test_rank_finds_planted_insensitive_layers(tmp_path: Path) -> None:
    """Layers behind output projections of nearly zero are the ones that lose most."""
    model = tiny_model()
    with torch.no_grad():
        for layer in (0, 2):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(1e-3)
            model.model.layers[layer].mlp.down_proj.weight.mul_(1e-3)
    request = request_of(tmp_path, model=model, levels=EIGHTHS)
    request = Request(
        **{
            **vars(request),
            "matrices": [
                matrix for matrix in request.matrices if not matrix.name.endswith(("o_proj.weight", "down_proj.weight"))
            ],
        }
    )
    found = densities(Rank(spread=0.3).allocate(request), request)
    assert max(found[0], found[2]) < min(found[1], found[3])
