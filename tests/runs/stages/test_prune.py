"""Where mask learning starts from."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import PreTrainedModel

from shearing.errors import ShearingError
from shearing.files import tensors as tensor_files
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import unit_sizes
from shearing.pruning.structured.importance.metric import Evidence, Scores
from shearing.pruning.structured.importance.registry import METRICS, MetricFacts
from shearing.runs.context import RunContext
from shearing.runs.recipe import load_recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.prune import prune
from shearing.settings.quantities import Duration


def pruned(recipe: Path, *overrides: str, run_dir: Path) -> RunDirectory:
    prune(RunContext(load_recipe(recipe, overrides=["prune.duration=3 steps", *overrides, f"run_dir={run_dir}"])))
    return RunDirectory(run_dir)


def first_loss(directory: RunDirectory) -> float:
    loss: float = json.loads(directory.metrics("prune").read_text().splitlines()[0])["loss"]
    return loss


@pytest.mark.parametrize(
    ("settings", "compensates"),
    [
        (["prune.initial_masks=reconstruction"], True),
        (["prune.initial_masks=activations"], True),
        (["prune.initial_masks=activations", "prune.sparsity_warmup=2 steps"], False),
        (["prune.initial_masks=open", "prune.sparsity_warmup=2 steps"], False),
    ],
)
def test_what_the_start_closes_is_made_up_for_and_only_that(
    tiny_recipe: Path, tmp_path: Path, settings: list[str], compensates: bool
):
    losses = [
        first_loss(
            pruned(tiny_recipe, "prune.freeze=1 steps", *settings, f"prune.compensate={on}", run_dir=tmp_path / on)
        )
        for on in ("true", "false")
    ]
    assert (losses[0] != losses[1]) == compensates


def test_both_importances_agree_on_layers_and_hidden_dimensions_and_not_on_units(tiny_recipe: Path, tmp_path: Path):
    scores = {
        name: load_file(
            pruned(tiny_recipe, f"prune.initial_masks={name}", run_dir=tmp_path / name).path
            / "prune"
            / "start_scores.safetensors"
        )
        for name in ("activations", "reconstruction")
    }
    for name in ("layers", "attention", "mlp", "hidden"):
        torch.testing.assert_close(scores["activations"][name], scores["reconstruction"][name])
    ranks = [scores[name]["intermediate"].argsort(-1) for name in scores]
    assert not torch.equal(*ranks)


@pytest.mark.parametrize("name", ["start_scores", "moments", "masks", "model"])
def test_a_full_disk_is_said_of_the_run_and_the_stage_continues_later(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    save_file, open_file = tensor_files.save_file, tensor_files.opened_in_turn

    def full(tensors: Any, path: Path, **keywords: Any) -> None:
        if path.name == f".{name}.safetensors.writing":
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, **keywords)

    @contextlib.contextmanager
    def full_in_turn(path: Path, *arguments: Any, **keywords: Any) -> Iterator[Any]:
        with open_file(path, *arguments, **keywords) as write:
            yield write
            if path.name == f"{name}.safetensors":
                raise OSError(errno.ENOSPC, "No space left on device")

    settings = ["prune.initial_masks=activations"]
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", full)
        patch.setattr(tensor_files, "opened_in_turn", full_in_turn)
        with pytest.raises(ShearingError, match="one more checkpoint") as caught:
            pruned(tiny_recipe, *settings, run_dir=tmp_path / "run")
    assert caught.value.field == "run_dir"
    assert str(caught.value.value).startswith(f"{tmp_path / 'run' / 'prune'}, with ")
    run = pruned(tiny_recipe, *settings, run_dir=tmp_path / "run")
    whole = pruned(tiny_recipe, *settings, run_dir=tmp_path / "whole")
    model = Path("prune") / "model.safetensors"
    assert (run.path / model).read_bytes() == (whole.path / model).read_bytes()


def test_a_metric_declared_here_and_registered_grades_the_start(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(METRICS, "last", MetricFacts(home=f"{__name__}:Last", reads_text=False, title="the last"))
    recipe = load_recipe(tiny_recipe, overrides=["prune.duration=3 steps", f"run_dir={tmp_path / 'last'}"])
    settings = recipe.pruning.prune.model_copy(update={"initial_masks": "last", "freeze": Duration(fraction=1.0)})
    prune(RunContext(recipe.model_copy(update={"prune": settings})))
    masks = load_file(RunDirectory(tmp_path / "last").prune / "masks.safetensors")
    assert masks["hidden"].tolist() == [0.0] * 16 + [1.0] * 16
    assert masks["attention"].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert masks["intermediate"].sum(0).tolist() == [0.0] * 24 + [4.0] * 24


class Last:
    """The last units of every row are the best."""

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        del source, evidence
        return 1

    def scores(self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None]) -> Scores:
        assert evidence.text == ()
        advance(1)
        sizes = unit_sizes(Shape.of(model.config))
        return {name: torch.arange(float(size[-1])).expand(size).contiguous() for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("settings", "missed"),
    [
        ([], False),
        (["prune.estimator=hard_concrete", "prune.initial_masks=open", "prune.sparsity_warmup=2 steps"], True),
    ],
)
def test_a_target_that_masks_did_not_reach_is_said(
    tiny_recipe: Path, tmp_path: Path, settings: list[str], missed: bool
) -> None:
    overrides = [*settings, "prune.duration=3 steps", "prune.freeze=1 steps", f"run_dir={tmp_path / 'run'}"]
    said = StringIO()
    summary = prune(RunContext(load_recipe(tiny_recipe, overrides=overrides), console=Console(file=said, width=200)))
    counts = summary["parameters"]
    assert ("when the masks stopped moving they left" in said.getvalue()) == missed
    assert f"{counts['kept']:,} ({counts['learned']:,} when masks stopped moving)" in said.getvalue()
    assert (counts["learned"] > 1.1 * counts["kept"]) == missed
