"""What steers reads validation text alone, what judges reads test text alone: a token is planted in one of them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from shearing.data.corpus.format import HELD_OUT, HeldOutSplit
from shearing.evaluation.reference_losses.measure import measure_losses
from shearing.pruning.sparse.one_shot import sparsify
from shearing.pruning.sparse.recipe import SparsifyRecipe
from shearing.runs.recipe import Recipe
from shearing.runs.stages.run import run
from tests.conftest import tiny_recipe_data

PLANTED = 0  # the unknown token, which no text of the tiny corpus has


@pytest.fixture(params=HELD_OUT)
def planted(request: pytest.FixtureRequest, tiny_inputs: Path, tmp_path: Path) -> tuple[Path, HeldOutSplit]:
    """A corpus one of whose held-out splits says nothing but the planted token, and which."""
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_inputs / "corpus", corpus)
    for folder in (path.parent for path in corpus.glob("*/manifest.json")):
        manifest = json.loads((folder / "manifest.json").read_text())
        path = folder / f"{request.param}.bin"
        tokens = np.fromfile(path, dtype=manifest["dtype"])
        assert PLANTED not in tokens
        np.where(tokens == manifest["separator_id"], tokens, PLANTED).astype(tokens.dtype).tofile(path)
    return corpus, request.param


@pytest.fixture
def saw(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Whether any model has been given a batch that is planted text since this was last asked."""
    seen: list[bool] = []
    embedding = F.embedding

    def watched(tokens: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        seen.append(bool((tokens == PLANTED).float().mean() > 0.5))
        return embedding(tokens, *arguments, **keywords)

    monkeypatch.setattr(F, "embedding", watched)

    def answer() -> bool:
        assert seen, "no model was computed"
        found = any(seen)
        seen.clear()
        return found

    return answer


@pytest.mark.parametrize("mixture", [{}, {"reference": "online", "update": "robust"}, {"losses": "training"}], ids=str)
def test_runs(
    planted: tuple[Path, HeldOutSplit],
    saw: Callable[[], bool],
    mixture: dict[str, Any],
    tiny_inputs: Path,
    tmp_path: Path,
) -> None:
    corpus, split = planted
    data = tiny_recipe_data(tiny_inputs, run_dir=tmp_path / "run")
    data["data"]["corpus"] = str(corpus)
    data["mixture"] |= mixture
    recipe = Recipe.model_validate(data)
    quiet = Console(file=io.StringIO())
    run(recipe, stages=["prune", "compact", "pretrain"], console=quiet)
    assert saw() == (split == "validation")
    run(recipe, stages=["evaluate"], console=quiet)
    assert saw() == (split == "test")


def test_one_shot_sparsity(
    planted: tuple[Path, HeldOutSplit], saw: Callable[[], bool], tiny_inputs: Path, tmp_path: Path
) -> None:
    corpus, split = planted

    def masks(calibration: Path, output: Path, **settings: Any) -> bytes:
        values = {"criterion": "wanda", "pattern": "2:4", "samples": 8, "seqlen": 16, "device": "cpu", **settings}
        values |= {"model": str(tiny_inputs / "model"), "calibration": [str(calibration)], "output": str(output)}
        sparsify(SparsifyRecipe.model_validate(values), console=Console(file=io.StringIO()))
        return (output / "masks.packed").read_bytes()

    found = masks(corpus, tmp_path / "sparse", evaluate=str(corpus), evaluate_tokens=64)
    assert saw() == (split == "test")
    assert found == masks(tiny_inputs / "corpus", tmp_path / "other")


def test_reference_losses(
    planted: tuple[Path, HeldOutSplit], saw: Callable[[], bool], tiny_inputs: Path, tmp_path: Path
) -> None:
    corpus, split = planted
    measure_losses(
        [str(tiny_inputs / "model")],
        corpus=corpus,
        output=tmp_path / "table.json",
        domains=None,
        sequence_length=16,
        tokens_per_domain=64,
        micro_batch_size=2,
        device=torch.device("cpu"),
        precision=torch.float32,
        console=Console(file=io.StringIO()),
    )
    assert saw() == (split == "validation")
