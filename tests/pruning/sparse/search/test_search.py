"""The search: candidates keep the budget, cost what the pruned model costs, get better, and survive a kill.

Legend: U units, V levels.
"""

from __future__ import annotations

import os
import signal
from fractions import Fraction
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings as limits, strategies as st
from rich.console import Console
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from shearing.errors import ShearingError
from shearing.models.stored.stored_model import open_source
from shearing.pruning.calibration.dense_layers import dense_layers
from shearing.pruning.calibration.places import Matrix, matrices_of
from shearing.pruning.calibration.stored_walk import Compute
from shearing.pruning.calibration.text import Calibration
from shearing.pruning.sparse.allocation.allocator import Allocation, Request, mean_density, patterns_of, units_of
from shearing.pruning.sparse.allocation.rules.depth import Depth
from shearing.pruning.sparse.criteria import criteria
from shearing.pruning.sparse.patterns import KeptOf, PerRow, pattern_of, runs_on_2_4
from shearing.pruning.sparse.reconstruction import reconstructions
from shearing.pruning.sparse.reconstruction.reconstruction import Choice
from shearing.pruning.sparse.search import database as database_module, msp as msp_module
from shearing.pruning.sparse.search.database import build_database
from shearing.pruning.sparse.search.evolution import SearchSettings
from shearing.pruning.sparse.search.fitness import Fitness, Training
from shearing.pruning.sparse.search.genome import Genome, Space
from shearing.pruning.sparse.search.msp import Msp
from shearing.pruning.sparse.search.population import first_population
from tests.forks import PROCESSES
from tests.models.tiny import tiny_ids, tiny_model

QUARTERS = [KeptOf(kept, 4) for kept in range(1, 5)]
EIGHTHS = [KeptOf(kept, 8) for kept in range(1, 9)]
# Nine levels need two planes, and rows' masks of falling sparsity come in another form than groups.
NINTHS = [PerRow(Fraction(removed, 10)) for removed in range(9, 0, -1)]
CALIBRATION = Calibration(tiny_ids(sequences=3, length=20), "random")
TEXT = Calibration(tiny_ids(sequences=4, length=20, seed=1), "random")
METHODS = [
    ("magnitude", "none"),
    ("wanda", "none"),
    ("sparsegpt", "obs"),
    ("wanda", "obs"),
    ("ria", "obs"),
    ("ria", "dsnot"),
    ("wanda", "admm_gradual"),
    ("wanda", "alps"),
]


def request_of(
    folder: Path,
    *,
    method: tuple[str, str] = ("wanda", "none"),
    model: PreTrainedModel | None = None,
    **changes: Any,
) -> Request:
    if not (folder / "model").exists():
        (model or tiny_model()).save_pretrained(folder / "model")
    source = open_source(str(folder / "model"), revision=None, converted=folder / "converted")
    values: dict[str, Any] = {
        "source": source,
        "matrices": matrices_of(source),
        "calibration": CALIBRATION,
        "criterion": criteria()[method[0]],
        "reconstruction": reconstructions()[method[1]],
        "damping": 0.01,
        "budget": Fraction(1, 2),
        "levels": QUARTERS,
        "unit": "block",
        "compute": Compute(torch.device("cpu"), torch.float32, 2, "cpu", folder / "run"),
        "console": Console(file=StringIO()),
    }
    return Request(**values | changes)


def fitness_of(request: Request, **changes: Any) -> Fitness:
    database = build_database(request, folder=request.compute.folder / "levels")
    values: dict[str, Any] = {"database": database, "text": TEXT, "stages": [1, 4], "kind": "loss"}
    return Fitness(request, **values | changes)


def pruned_alone(request: Request, name: str, level: int) -> torch.Tensor:
    """A matrix [O, I] at one level, from dense statistics, by the reconstruction and nothing of the search."""
    (matrix,) = (matrix for matrix in request.matrices if matrix.name == name)
    (of_layer,) = dense_layers(
        request.source,
        matrices=[matrix],
        needs=request.criterion.needs | request.reconstruction.needs,
        damping=request.damping,
        calibration=request.calibration,
        compute=request.compute,
    )
    choice = Choice(request.criterion, request.levels[level], of_layer.statistics[name])
    return request.reconstruction.prune(of_layer.weights[name], choice=choice)[0]


@st.composite
def spaces(draw: st.DrawFn) -> tuple[Space, list[Genome]]:
    """A space with units of any sizes and levels at any distances, and two candidates of it."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=7))
    units = units_of([Matrix(f"m{i}", i, 8, 8 * size) for i, size in enumerate(sizes)], unit="matrix")
    kept = sorted(draw(st.sets(st.integers(1, 8), min_size=1, max_size=8)))
    levels = [KeptOf(count, 8) for count in kept]
    choices = [[draw(st.integers(0, len(levels) - 1)) for _ in units] for _ in range(2)]
    matrices = [matrix for unit in units for matrix in unit.matrices]
    budget = mean_density(patterns_of(units, choice=choices[0], levels=levels), matrices=matrices)
    space = Space(units, levels, budget)
    return space, [tuple(choices[0]), space.repair(choices[1], random=np.random.default_rng(0))]


@limits(deadline=None)
@given(drawn=spaces(), seed=st.integers(0, 2**32 - 1))
def test_operators_keep_the_budget_and_the_bounds(drawn: tuple[Space, list[Genome]], seed: int) -> None:
    space, (one, other) = drawn
    random = np.random.default_rng(seed)
    children = [
        space.uniform(),
        space.crossover(one, other, random=random),
        space.swap(one, random=random),
        space.mutate(other, more=0.5, random=random),
    ]
    assert all(space.holds(genome) for genome in [one, other, *children])


@limits(deadline=None, max_examples=30)
@given(drawn=spaces(), data=st.data())
def test_the_first_population_is_in_the_space(drawn: tuple[Space, list[Genome]], data: st.DataObject) -> None:
    space, (start, _) = drawn
    count = len(space.units)
    sensitivity = data.draw(st.lists(st.floats(0, 1e6), min_size=count, max_size=count))
    starts = {"uniform": space.uniform(), "planted": start}
    found = first_population(space, sensitivity=sensitivity, starts=starts, size=12, random=np.random.default_rng(0))
    assert all(space.holds(genome) for genome in found)
    assert found.keys() >= set(starts.values())


def test_more_sensitive_is_denser_in_the_first_population() -> None:
    units = units_of([Matrix(f"m{i}", i, 8, 8) for i in range(8)], unit="matrix")
    space = Space(units, EIGHTHS, Fraction(1, 2))
    found = first_population(
        space, sensitivity=[10.0**i for i in range(8)], starts={}, size=1, random=np.random.default_rng(0)
    )
    assert len(found) > 1
    assert all(list(genome) == sorted(genome) for genome in found)


@pytest.mark.parametrize("most", [database_module.MOST_ELEMENTS, 4096], ids=["together", "in turn"])
@pytest.mark.parametrize("levels", [QUARTERS, NINTHS], ids=["groups", "rows"])
@pytest.mark.parametrize("method", METHODS, ids="-".join)
def test_a_matrix_at_a_level_is_what_the_reconstruction_makes(
    method: tuple[str, str], levels: list[Any], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "MOST_ELEMENTS", most)
    request = request_of(tmp_path, method=method, levels=levels)
    database = build_database(request, folder=tmp_path / "levels")
    for kind in ("self_attn.k_proj", "mlp.down_proj"):
        name = f"model.layers.1.{kind}.weight"
        (matrix,) = (matrix for matrix in request.matrices if matrix.name == name)
        found = torch.empty(matrix.rows, matrix.columns)
        for level in (len(levels) - 1, 0, len(levels) // 2):
            database.put(found, name=name, level=level)
            expected = pruned_alone(request, name, level)
            assert torch.equal(found == 0, expected == 0)
            if method[1] == "none":
                assert torch.equal(found, expected)
            else:
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["loss", "kl"])
@pytest.mark.parametrize("method", METHODS[1:3], ids="-".join)
def test_fitness_is_of_the_pruned_model(method: tuple[str, str], kind: str, tmp_path: Path) -> None:
    request = request_of(tmp_path, method=method)
    fitness = fitness_of(request, kind=kind)
    inputs, targets = TEXT.tokens[:, :-1], TEXT.tokens[:, 1:]
    for genome in [(0, 1, 2, 1), (3, 1, 0, 0)]:
        model = tiny_model()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            dense = model(inputs).logits.log_softmax(-1)
            for unit, level in zip(request.units, genome, strict=True):
                for matrix in unit.matrices:
                    parameters[matrix.name].copy_(pruned_alone(request, matrix.name, level))
            logits = model(inputs).logits
        by_row = [
            cross_entropy(of_row, wanted)
            if kind == "loss"
            else kl_div(of_row.log_softmax(-1), of_dense, log_target=True, reduction="sum") / len(wanted)
            for of_row, of_dense, wanted in zip(logits, dense, targets, strict=True)
        ]
        assert fitness(genome, 0) == pytest.approx(float(by_row[0]), rel=1e-4)
        assert fitness(genome, 1) == pytest.approx(float(torch.stack(by_row).mean()), rel=1e-4)


def test_no_token_is_read_twice(tmp_path: Path) -> None:
    fitness = fitness_of(request_of(tmp_path))
    genome = (1, 1, 1, 1)
    fitness(genome, 0)
    assert (fitness.passes, fitness.tokens) == (1, 19)
    for _ in range(2):
        fitness(genome, 1)
        assert (fitness.passes, fitness.tokens) == (2, 4 * 19)


def test_candidates_that_overflow_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitness = fitness_of(request_of(tmp_path))
    good = fitness((1, 1, 1, 1), 1)
    with torch.no_grad():
        fitness._model.model.get_input_embeddings().weight.fill_(float("nan"))
    assert good < fitness((0, 2, 1, 1), 1) < float("inf")


TRAINING = Training(steps=3, learning_rate=1e-3, batch=2)


@pytest.mark.parametrize("method", [("wanda", "none"), ("sparsegpt", "obs")], ids="-".join)
def test_fitness_after_training_is_of_the_trained_model(method: tuple[str, str], tmp_path: Path) -> None:
    """Adam on the calibration text in its order, in a plain loop; zeros stay, and nothing else is trained."""
    request = request_of(tmp_path, method=method)
    fitness = fitness_of(request, training=TRAINING)
    inputs, targets = TEXT.tokens[:, :-1], TEXT.tokens[:, 1:]
    for genome in [(0, 1, 2, 1), (3, 1, 0, 0)]:
        model = tiny_model()
        matrices = [matrix for unit in request.units for matrix in unit.matrices]
        levels = dict(zip((unit.layer for unit in request.units), genome, strict=True))
        weights = [model.get_parameter(matrix.name) for matrix in matrices]
        with torch.no_grad():
            for matrix, weight in zip(matrices, weights, strict=True):
                weight.copy_(pruned_alone(request, matrix.name, levels[matrix.layer]))
        masks = [weight.detach() != 0 for weight in weights]
        optimizer = torch.optim.Adam(weights, lr=1e-3)
        for rows in ([0, 1], [2, 0], [1, 2]):
            text = CALIBRATION.tokens[rows]
            cross_entropy(model(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for weight, mask in zip(weights, masks, strict=True):
                    weight *= mask
        with torch.no_grad():
            by_row = [cross_entropy(of, wanted) for of, wanted in zip(model(inputs).logits, targets, strict=True)]
        assert fitness(genome, 0) == pytest.approx(float(by_row[0]), rel=1e-4)
        assert fitness(genome, 1) == pytest.approx(float(torch.stack(by_row).mean()), rel=1e-4)


def test_training_one_candidate_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    request = request_of(tmp_path)
    one, other = (0, 1, 2, 1), (3, 1, 0, 0)
    alone = fitness_of(request, training=TRAINING)
    after = fitness_of(request, training=TRAINING)
    after(one, 0)
    assert after(other, 1) == alone(other, 1)
    first = fitness_of(request, training=TRAINING)
    assert first(one, 0) == after(one, 0)
    assert first(one, 1) == after(one, 1)
    assert after(one, 1) != fitness_of(request)(one, 1)


def planted() -> PreTrainedModel:
    """Decoder layers 1 and 2 add next to nothing."""
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers[1:3]:
            layer.self_attn.o_proj.weight.mul_(1e-4)
            layer.mlp.down_proj.weight.mul_(1e-4)
    return model


SETTINGS = SearchSettings(population=6, offspring=8, generations=6)


@pytest.mark.parametrize("seed", [0, 1])
def test_layers_that_do_nothing_become_sparsest(seed: int, tmp_path: Path) -> None:
    request = request_of(tmp_path, model=planted())
    allocation = Msp(TEXT, SETTINGS, kind="kl", seed=seed).allocate(request)
    of_unit = [allocation.patterns[unit.matrices[0].name] for unit in request.units]
    assert of_unit[1:3] == [KeptOf(1, 4)] * 2


@pytest.mark.parametrize("unit", ["block", "matrix"])
def test_best_never_gets_worse_and_beats_every_start(unit: str, tmp_path: Path) -> None:
    request = request_of(tmp_path, unit=unit)
    allocation = Msp(TEXT, SETTINGS, starts={"depth": Depth()}).allocate(request)
    facts = allocation.facts
    best = [record["best"] for record in facts["history"]]
    assert len(best) == SETTINGS.generations + 1
    assert best == sorted(best, reverse=True)
    assert facts["fitness"]["msp"] == best[-1] <= min(facts["fitness"].values())
    assert facts["fitness"].keys() == {"msp", "uniform", "depth"}
    assert facts["tokens"] == facts["history"][-1]["tokens"] > 0
    assert mean_density(allocation.patterns, matrices=request.matrices) == Fraction(1, 2)


def _searched(folder: Path) -> Allocation:
    starts = {"depth": Depth()}
    return Msp(TEXT, SETTINGS, starts=starts).allocate(request_of(folder, unit="matrix"))


def _searched_until_killed(folder: Path, passes: int, cache: str) -> None:
    os.environ["SHEARING_CACHE"] = cache
    whole, done = Fitness._sum, []

    def counted(self: Fitness, first: int, last: int) -> float:
        done.append(first)
        if len(done) > passes:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, first, last)

    Fitness._sum = counted  # type: ignore[method-assign]
    _searched(folder)


def _without_time(allocation: Allocation) -> dict[str, Any]:
    history = [{**record, "seconds": 0} for record in allocation.facts["history"]]
    return {**allocation.facts, "seconds": 0, "history": history}


def test_killed_and_continued_is_the_same_bits(tmp_path: Path, own_cache: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "killed" / "model")
    arguments = (tmp_path / "killed", 30, str(own_cache))
    process = PROCESSES.Process(target=_searched_until_killed, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed" / "run" / "search.json").is_file()
    continued, whole = _searched(tmp_path / "killed"), _searched(tmp_path / "whole")
    assert continued.patterns == whole.patterns
    assert _without_time(continued) == _without_time(whole)


def test_a_database_that_was_interrupted_is_completed(tmp_path: Path) -> None:
    request = request_of(tmp_path, method=("sparsegpt", "obs"))
    build_database(request, folder=tmp_path / "levels")
    path = tmp_path / "levels" / "00002.safetensors"
    before, kept = path.read_bytes(), (tmp_path / "levels" / "00001.safetensors").stat().st_mtime_ns
    path.unlink()
    build_database(request, folder=tmp_path / "levels")
    assert path.read_bytes() == before
    assert (tmp_path / "levels" / "00001.safetensors").stat().st_mtime_ns == kept


def test_room_is_needed_for_missing_layers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(tmp_path, method=("sparsegpt", "obs"))
    sizes = {layer: sum(m.size for m in request.matrices if m.layer == layer) for layer in range(4)}
    build_database(request, folder=tmp_path / "levels")
    (tmp_path / "levels" / "00003.safetensors").unlink()
    needed = sizes[3] * 4 * len(QUARTERS)
    for free, enough in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(database_module.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if enough:
            build_database(request, folder=tmp_path / "levels")
        else:
            with pytest.raises(ShearingError, match="GB"):
                build_database(request, folder=tmp_path / "levels")


def test_a_search_asks_for_room_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(tmp_path, method=("sparsegpt", "obs"))
    monkeypatch.setattr(database_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(msp_module, "fisher_trace", lambda *_, **__: 1 / 0)
    with pytest.raises(ShearingError, match="fewer levels"):
        Msp(TEXT, SETTINGS).allocate(request)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("of", range(1, 13))
def test_runs_on_2_4_is_the_worst_mask(of: int) -> None:
    for kept in range(1, of + 1):
        pattern = pattern_of(f"{kept}:{of}")
        # The window of 4 that meets the group at every offset: each group puts in as many as fit, up to N.
        worst = 0
        for start in range(0, 4 * of, 4):
            groups = [position // of for position in range(start, start + 4)]
            worst = max(worst, sum(min(kept, groups.count(group)) for group in set(groups)))
        assert runs_on_2_4(pattern) == (worst <= 2), pattern
