"""Units that go while weights are trained, as an ordinary stage of a run: exact target, resumed, cut, reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from shearing.errors import ShearingError
from shearing.runs.context import RunContext
from shearing.runs.planning.preflight import preflight
from shearing.runs.recipe import load_recipe, overridden
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.run import run
from shearing.training.metrics import TIMING_FIELDS
from shearing.training.stage import Interrupted
from tests.training.tasks import stop_at

WAYS = ["staged", "gradual"]
COMMON = ["prune.freeze=1 steps", "prune.saliency_window=1 steps", "prune.removal_stages=2", "mixture.interval=2 steps"]


def lines_of(directory: RunDirectory) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in directory.metrics("prune").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


@pytest.mark.parametrize("way", WAYS)
def test_a_whole_run_ends_at_exactly_the_target(way: str, tiny_recipe: Path) -> None:
    recipe = load_recipe(tiny_recipe, overrides=[*COMMON, f"prune.masks={way}"])
    directory = run(recipe)
    masks = load_file(directory.prune / "masks.safetensors")
    assert {name: mask.sum(-1).flatten().unique().tolist() for name, mask in masks.items()} == {
        "hidden": [16.0],
        "attention": [2.0],
        "mlp": [2.0],
        "query_heads": [1.0],
        "intermediate": [24.0],
    }
    summary = json.loads((directory.prune / "summary.json").read_text())
    assert summary["kept"] == summary["target"] == summary["expected"]
    assert summary["changed_from_start"] == dict.fromkeys(summary["kept"], "open")
    shrinking = [line["expected"]["intermediate"] for line in lines_of(directory) if "event" not in line]  # type: ignore[index]
    assert shrinking == sorted(shrinking, reverse=True)
    assert len(set(shrinking)) > 1
    rows = json.loads(directory.evaluation.read_text())["models"]
    labels = [row["label"] for row in (rows.values() if isinstance(rows, dict) else rows)]
    assert f"{way} masks, pretrained" in labels
    assert f"<dt>{way} masks</dt><dd>6 steps" in (page := directory.report.read_text())
    assert f"Sizes at the end of {way} masks." in page
    assert "<dt>mask learning" not in page


@pytest.mark.parametrize("way", WAYS)
def test_stopped_and_continued_is_the_same_run(
    way: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*COMMON, f"prune.masks={way}", "prune.saliency_window=2 steps"]
    whole = run(load_recipe(tiny_recipe, overrides=overrides), stages=["prune"])
    again = load_recipe(tiny_recipe, overrides=[*overrides, f"run_dir={tmp_path / 'again'}"])
    with monkeypatch.context() as patch:
        stop_at(3, patch=patch)
        with pytest.raises(Interrupted):
            run(again, stages=["prune"], console=Console(quiet=True))
    continued = run(again, stages=["prune"])
    assert lines_of(continued) == lines_of(whole)
    for name in ("masks", "model", "moments"):
        written = [(each.prune / f"{name}.safetensors").read_bytes() for each in (whole, continued)]
        assert written[0] == written[1]


@pytest.mark.parametrize("way", WAYS)
def test_keys_of_learned_masks_are_not_looked_at(way: str, tiny_recipe: Path) -> None:
    """Neither refused nor doubtful, as they are where masks are learned."""
    keys = ["prune.estimator=hard_concrete", "prune.mask_learning_rate=1e-3", "prune.initial_masks=open"]
    recipe = load_recipe(tiny_recipe, overrides=[*COMMON, *keys, f"prune.masks={way}"])
    learned = overridden(recipe, overrides=["prune.masks=learned"])
    doubts = [preflight(RunContext(each), stages=["prune"]).doubts for each in (learned, recipe)]
    assert len(doubts[0]) == 2 + len(doubts[1])
    overridden(recipe, overrides=["prune.sparsity_warmup=6 steps"])
    with pytest.raises(ShearingError, match=r"prune\.sparsity_warmup"):
        overridden(learned, overrides=["prune.sparsity_warmup=6 steps"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["prune.masks=gradual", "prune.freeze=100%"], r"prune\.saliency_window = '2 steps'"),
        (["prune.masks=staged", "prune.removal_stages=9"], r"9 stages of 6 steps begin after steps 2, 2, 2"),
        (
            ["prune.masks=staged", "prune.granularities=[sublayers,query_heads,intermediate,hidden]"],
            "have to alternate",
        ),
        (["prune.masks=gradual", "target={parameters: 5000}"], r"with a target in target\.parameters"),
        (["prune.masks=gradually"], "'learned', 'staged' or 'gradual'"),
    ],
)
def test_what_cannot_be_is_said_at_once(overrides: list[str], said: str, tiny_recipe: Path) -> None:
    with pytest.raises(ShearingError, match=said):
        load_recipe(tiny_recipe, overrides=overrides)
