"""Sparser on top of sparse: what is zero stays zero, and counts, whatever the criterion, pattern and reconstruction."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from shearing.pruning.sparse.criteria import CRITERIA, criteria
from shearing.pruning.sparse.one_shot import sparsify
from shearing.pruning.sparse.patterns import Cumulative, KeptOf, Pattern, PerLayer, PerRow
from shearing.pruning.sparse.reconstruction import RECONSTRUCTIONS, obs, prune_matrix, reconstructions
from shearing.pruning.sparse.reconstruction.reconstruction import Choice
from shearing.pruning.sparse.search.database import build_database
from shearing.pruning.sparse.stored.check import differences
from shearing.pruning.sparse.stored.manifest import read_manifest
from shearing.pruning.sparse.stored.masks import FILE_NAME, read_masks
from tests.models.tiny import tiny_model
from tests.pruning.sparse import oracle
from tests.pruning.sparse.search.test_search import request_of
from tests.pruning.sparse.test_criteria import HALF, sample, statistics_of
from tests.pruning.sparse.test_one_shot import recipe_of, sparse

PATTERNS: list[Pattern] = [PerRow(HALF), PerLayer(HALF), Cumulative(HALF), KeptOf(2, 4), KeptOf(5, 12), KeptOf(1, 4)]
LEFT_TO_RIGHT = [("sparsegpt", "obs"), ("isc", "obs")]
METHODS = [(c, r, p) for c, r, p in product(CRITERIA, RECONSTRUCTIONS, PATTERNS) if (c, r) not in LEFT_TO_RIGHT] + [
    (c, r, pattern) for (c, r), pattern in product(LEFT_TO_RIGHT, PATTERNS) if not pattern.whole_rows
]


def holed() -> tuple[Tensor, Tensor]:
    """A weight with a third of zeros, two rows with more than any pattern here removes; inputs, one of them dead."""
    weight, inputs = sample()
    generator = torch.Generator().manual_seed(7)
    weight[torch.rand(weight.shape, generator=generator) < 0.33] = 0.0
    weight[3, :45] = 0.0
    weight[5] = -0.0
    inputs[..., 9] = 0.0
    return weight, inputs


@pytest.mark.parametrize(("criterion", "way", "pattern"), METHODS, ids=lambda value: str(value))
def test_zeros_stay_and_count(criterion: str, way: str, pattern: Pattern) -> None:
    weight, inputs = holed()
    zeros, before = weight == 0, weight.clone()
    choice = Choice(criteria()[criterion], pattern, statistics_of(inputs))
    new, mask = prune_matrix(weight, reconstruction=reconstructions()[way], choice=choice)
    assert torch.equal(weight, before)
    assert not bool((mask & zeros).any())
    assert not bool(new[~mask].any())
    assert pattern.holds(mask)
    for found, wanted in _removed(mask, zeros=zeros, pattern=pattern, block=obs.BLOCK_COLUMNS):
        assert found == wanted


def _removed(mask: Tensor, *, zeros: Tensor, pattern: Pattern, block: int) -> Iterator[tuple[int, int]]:
    """How many weights are gone of each group that a pattern counts in, and how many should be: no fewer than zeros."""
    assert mask.shape[1] <= block  # so that SparseGPT, too, chooses once
    if isinstance(pattern, KeptOf):
        parts, least = pattern.of, pattern.of - pattern.kept
        for gone, before in zip((~mask).reshape(-1, parts), zeros.reshape(-1, parts), strict=True):
            yield int(gone.sum()), max(least, int(before.sum()))
    elif isinstance(pattern, PerRow):
        for gone, before in zip(~mask, zeros, strict=True):
            yield int(gone.sum()), max(mask.shape[1] // 2, int(before.sum()))
    elif isinstance(pattern, PerLayer):
        yield int((~mask).sum()), mask.numel() // 2
    else:
        assert abs(float((~mask).double().mean()) - 0.5) <= 0.03
        yield 0, 0


@pytest.mark.parametrize("pattern", [PerRow(HALF), PerLayer(HALF), KeptOf(2, 4)], ids=str)
def test_what_stays_makes_up_for_what_goes_and_for_nothing_else(pattern: Pattern) -> None:
    """A zero is a weight that a mask removed before: what compensation would put there moves on."""
    weight, inputs = holed()
    choice = Choice(criteria()["wanda"], pattern, statistics_of(inputs))
    found, mask = prune_matrix(weight, reconstruction=reconstructions()["obs"], choice=choice)
    expected, _ = oracle.sparsegpt(weight, oracle.hessian(inputs), None, groups=4, mask=mask)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-4)
    left, _ = prune_matrix(weight, reconstruction=reconstructions()["none"], choice=choice)
    assert oracle.output_error(weight, found, inputs) < oracle.output_error(weight, left, inputs)


def test_the_same_level_again_changes_nothing_that_is_kept() -> None:
    weight, inputs = sample()
    choice = Choice(criteria()["wanda"], KeptOf(2, 4), statistics_of(inputs))
    once, mask = prune_matrix(weight, reconstruction=reconstructions()["none"], choice=choice)
    for way in RECONSTRUCTIONS:
        twice, again = prune_matrix(once, reconstruction=reconstructions()[way], choice=choice)
        assert torch.equal(again, mask)
        torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-4)  # least squares round


@pytest.mark.parametrize("method", [("wanda", "none"), ("sparsegpt", "obs")])
def test_levels_of_a_search_keep_zeros(method: tuple[str, str], tmp_path: Path) -> None:
    model = tiny_model()
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        weight = model.get_parameter(name)
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0.0
        zeros = weight == 0
    request = request_of(tmp_path, model=model, method=method)
    database = build_database(request, folder=request.compute.folder / "levels")
    for level, pattern in enumerate(request.levels):
        found = torch.full(zeros.shape, 9.0)
        database.put(found, name=name, level=level)
        assert not bool(found[zeros].any())
        if isinstance(pattern, KeptOf):
            left = (~zeros).reshape(-1, pattern.of).sum(1).clamp(max=pattern.kept)
            assert torch.equal((found != 0).reshape(-1, pattern.of).sum(1), left)


@pytest.fixture(scope="module")
def third(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with 30 % of each row zero."""
    return sparse(tiny_inputs, tmp_path_factory.mktemp("third") / "sparse", pattern=None, sparsity=0.3)


@pytest.mark.parametrize(
    "method",
    [*((criterion, "none") for criterion in CRITERIA), *(("wanda", way) for way in RECONSTRUCTIONS if way != "none")],
    ids=str,
)
def test_a_sparse_model_made_sparser(method: tuple[str, str], third: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    before, removed = load_file(third / "model.safetensors"), dict(read_masks(third / FILE_NAME))
    for settings in ({"pattern": None, "sparsity": 0.6, "group": "row"}, {"pattern": "2:4"}):
        output = tmp_path / str(settings["pattern"])
        recipe = recipe_of(
            tiny_inputs, output, model=str(third), criterion=method[0], reconstruction=method[1], **settings
        )
        sparsify(recipe, console=Console(quiet=True))
        after = load_file(output / "model.safetensors")
        for name, mask in read_masks(output / FILE_NAME):
            assert not bool(after[name][before[name] == 0].any()), name
            assert not bool((mask & ~removed[name]).any()), name
        assert differences(output) == []
        manifest = read_manifest(output)
        zeros = {name: int((before[name] == 0).sum()) for name in removed}
        assert {name: about["zero_before"] for name, about in manifest["matrices"].items()} == zeros
        reached = manifest["budget"]["reached"]["sparsity"]
        if settings["pattern"] is None:
            assert reached == pytest.approx(0.6, abs=1 / 32)
        else:
            assert 0.5 < reached < 0.6  # groups of four that have lost three are not filled up


def test_a_model_that_is_sparser_than_asked_stays_as_it_is(third: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    output = sparse(
        tiny_inputs, tmp_path / "again", model=str(third), pattern=None, sparsity=0.1, criterion="magnitude"
    )
    assert (output / "model.safetensors").read_bytes() == (third / "model.safetensors").read_bytes()
    assert read_manifest(output)["budget"]["asked"]["sparsity"] == pytest.approx(0.1)
    assert read_manifest(output)["budget"]["reached"]["sparsity"] == pytest.approx(0.3, abs=1 / 32)
