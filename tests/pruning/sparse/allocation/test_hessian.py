"""Products with the Hessian equal differences of gradients; the allocation ranks by what they come to."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.func import functional_call, grad, jvp
from torch.nn.functional import cross_entropy

from shearing.errors import ShearingError
from shearing.models.stored.stored_model import open_source
from shearing.pruning.calibration import whole
from shearing.pruning.calibration.places import Matrix, matrices_of
from shearing.pruning.calibration.stored_walk import Compute
from shearing.pruning.calibration.text import Calibration
from shearing.pruning.sparse.allocation.hessian_trace import hessian_trace
from shearing.pruning.sparse.allocation.rules import hessian
from shearing.pruning.sparse.allocation.rules.hessian import HessianRank
from tests.models.tiny import tiny_ids, tiny_model
from tests.pruning.sparse.allocation.test_allocators import alike, densities, facts, planned

TOKENS = tiny_ids(sequences=2, length=12)


def traces_of(folder: Path, **changes: Any) -> dict[str, float]:
    source = open_source(str(folder / "model"), revision=None, converted=folder / "converted")
    settings: dict[str, Any] = {"matrices": matrices_of(source), "console": Console(file=StringIO())} | changes
    compute = Compute(torch.device("cpu"), torch.float32, 2, "cpu", folder)
    return hessian_trace(source, calibration=Calibration(TOKENS, "random"), compute=compute, **settings)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_equals_forward_differentiation_of_gradients(family: str, tmp_path: Path) -> None:
    """zᵀHz along the same z, one sequence at a time, by the other of the two ways to differentiate twice."""
    tiny_model(family).save_pretrained(tmp_path / "model")
    found = traces_of(tmp_path, seed=3)
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    weights = {name: model.get_parameter(name).detach() for name in found}
    generator = torch.Generator().manual_seed(3)
    expected = dict.fromkeys(found, 0.0)
    for row in TOKENS:

        def loss(weights: dict[str, Tensor], row: Tensor = row) -> Tensor:
            logits = functional_call(model, weights, (row[None, :-1],), {"use_cache": False}).logits[0]
            return cross_entropy(logits, row[1:])

        probes = {n: torch.randint(0, 2, w.shape, generator=generator).float() * 2 - 1 for n, w in weights.items()}
        _, products = jvp(grad(loss), (weights,), (probes,))
        for name, product in products.items():
            expected[name] += float((probes[name] * product.detach()).sum()) / len(TOKENS)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_is_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    found = traces_of(tmp_path)
    assert traces_of(tmp_path, seed=1) != found
    monkeypatch.setattr(whole, "load_source", lambda *_, **__: pytest.fail("computed again"))
    console = Console(file=StringIO(), width=200)
    assert traces_of(tmp_path, console=console) == found
    assert "from an earlier run" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_model_that_is_not_finite(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e38
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ShearingError, match="NaN or infinity in the Hessian by"):
        traces_of(tmp_path)


def test_levels_follow_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """s_i = (S - 0.1) + rank_i 0.2 / (U - 1), negative traces last."""
    traces = [3.0, 100.0, -2.0, 1.0]

    def planted(_: object, *, matrices: list[Matrix], **__: object) -> dict[str, float]:
        return {matrix.name: traces[matrix.layer] for matrix in matrices}

    monkeypatch.setattr(hessian, "hessian_trace", planted)
    request = planned(alike(4))
    allocation = HessianRank().allocate(request)
    assert facts(allocation, request, "wanted") == pytest.approx([0.5 + 0.1 / 3, 0.6, 0.4, 0.5 - 0.1 / 3])
    assert sum(densities(allocation, request)) == pytest.approx(2.0)
