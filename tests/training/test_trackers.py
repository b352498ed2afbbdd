"""Trackers, on one that only remembers; TensorBoard for real where it is installed."""

from __future__ import annotations

import importlib.machinery
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from accelerate import tracking

from shearing.errors import ShearingError
from shearing.runs.recipe import load_recipe
from shearing.training.trackers import PROJECT, Trackers, require_trackers

RECORD = {
    "step": 7,
    "loss": 2.5,
    "skipped": 0,
    "grad_norm": float("inf"),
    "weights": {"books": 0.25, "code": 0.75},
    "expected": {"hidden": {"mean": 1.0}},
    "max_memory": None,
    "name": "text",
    "final": True,
}
FLAT = {"loss": 2.5, "skipped": 0, "weights/books": 0.25, "weights/code": 0.75, "expected/hidden/mean": 1.0}


class Remembering(tracking.GeneralTracker):
    """In the place of one of accelerate's trackers."""

    name = "remembering"
    requires_logging_directory = False
    made: list[Remembering] = []  # noqa: RUF012  emptied by the fixture
    fails: frozenset[str] = frozenset()

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.lines, self.configuration = arguments, [], None
        self.finished = False
        self.made.append(self)
        super().__init__()

    @property
    def tracker(self) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="chosen-by-mlflow"))

    def start(self) -> None:
        self._act("start")

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        self.configuration = values

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        self._act("log")
        self.lines.append((step, values))

    def finish(self) -> None:
        self._act("finish")
        self.finished = True

    def _act(self, action: str) -> None:
        if action in self.fails:
            raise OSError(f"no {action}")


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> type[Remembering]:
    monkeypatch.setattr(Remembering, "made", [])
    monkeypatch.setattr(Remembering, "fails", frozenset())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "unused")  # so that what `open` sets is taken back
    for name in ("tensorboard", "wandb", "mlflow", "trackio"):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Remembering)
    return Remembering


def open_trackers(*names: str, folder: Path, first_step: int = 1, run_name: str = "demo-prune") -> Trackers:
    configuration = {"seed": 0, "prune.betas": [0.9, 0.95], "target.parameters": None, "name": "demo"}
    return Trackers.open(names, run_name=run_name, folder=folder, configuration=configuration, first_step=first_step)


def test_lines_arrive_flat_and_finite(remembering: type[Remembering], tmp_path: Path) -> None:
    trackers = open_trackers("wandb", "tensorboard", "wandb", folder=tmp_path)
    trackers.log(RECORD)
    trackers.log({"step": 7, "event": "mixture", "losses": {"books": 3.0}, "seconds": 0.5})
    trackers.close()
    trackers.close()
    assert len(remembering.made) == 2
    for tracker in remembering.made:
        assert tracker.lines == [(7, FLAT), (7, {"mixture/losses/books": 3.0, "mixture/seconds": 0.5})]
        assert tracker.configuration == {
            "seed": 0,
            "prune.betas": "[0.9, 0.95]",
            "target.parameters": None,
            "name": "demo",
        }
        assert tracker.finished


def test_a_continued_run_is_the_same_run(remembering: type[Remembering], tmp_path: Path) -> None:
    names = ("tensorboard", "wandb", "mlflow", "trackio")
    open_trackers(*names, folder=tmp_path).close()
    open_trackers(*names, folder=tmp_path, first_step=5).close()
    arguments = [tracker.arguments for tracker in remembering.made]
    first, second = dict(zip(names, arguments[:4], strict=True)), dict(zip(names, arguments[4:], strict=True))
    assert (first["tensorboard"]["purge_step"], second["tensorboard"]["purge_step"]) == (1, 5)
    assert first["wandb"] == second["wandb"]
    assert first["wandb"]["resume"] == "allow"
    assert first["trackio"] == second["trackio"]
    assert (first["mlflow"]["run_id"], second["mlflow"]["run_id"]) == (None, "chosen-by-mlflow")
    assert all(tracker.configuration is None for tracker in remembering.made[4:])
    # Another stage, and the same stage of a run elsewhere, are other runs.
    open_trackers("wandb", folder=tmp_path, run_name="demo-pretrain").close()
    open_trackers("wandb", folder=tmp_path / "elsewhere").close()
    identities = [tracker.arguments["id"] for tracker in (remembering.made[1], *remembering.made[8:])]
    assert len(set(identities)) == 3


def test_files_stay_in_the_folder(remembering: type[Remembering], tmp_path: Path) -> None:
    open_trackers("wandb", folder=tmp_path / "trackers", run_name="../a name").close()
    assert [path.name for path in tmp_path.iterdir()] == ["trackers"]
    assert remembering.made[0].arguments["name"] == "-a-name"


@pytest.mark.parametrize("action", ["log", "finish"])
def test_a_tracker_that_fails_does_not_stop_the_run(
    remembering: type[Remembering],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    action: str,
) -> None:
    trackers = open_trackers("wandb", "tensorboard", folder=tmp_path)
    failing, sound = remembering.made
    failing.fails = frozenset({action})
    for _ in range(3):
        trackers.log(RECORD)
    trackers.close()
    assert sound.lines == [(7, FLAT)] * 3
    assert sound.finished
    assert [record.getMessage() for record in caplog.records if "wandb failed" in record.getMessage()] == [
        f"wandb failed and gets no more of this run, metrics.jsonl has all of it: no {action}"
    ]


def test_a_tracker_that_does_not_start_is_an_error(
    remembering: type[Remembering], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembering, "fails", frozenset({"start"}))
    with pytest.raises(ShearingError, match="no start"):
        open_trackers("mlflow", folder=tmp_path)


def test_a_tracker_that_does_not_start_again_does_not_stop_the_run(
    remembering: type[Remembering], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_trackers("wandb", folder=tmp_path).close()
    monkeypatch.setattr(remembering, "fails", frozenset({"start"}))
    trackers = open_trackers("wandb", folder=tmp_path, first_step=5)
    trackers.log(RECORD)
    trackers.close()
    assert not remembering.made[-1].lines
    said = "wandb does not start, metrics.jsonl has what it lacks of this run: no start"
    assert said in [record.getMessage() for record in caplog.records]


def test_only_the_main_process_has_trackers(
    remembering: type[Remembering], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    trackers = open_trackers("wandb", folder=tmp_path / "trackers")
    trackers.log(RECORD)
    trackers.close()
    assert remembering.made == []
    assert not (tmp_path / "trackers").exists()


def test_no_trackers_cost_nothing(tmp_path: Path) -> None:
    trackers = open_trackers(folder=tmp_path / "trackers")
    trackers.log({})
    trackers.close()
    assert not (tmp_path / "trackers").exists()


def test_missing_packages_are_named_before_any_work(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(tiny_recipe, overrides=["training.trackers=[tensorboard, wandb, mlflow]"])
    installed = importlib.machinery.ModuleSpec("tensorboardX", None, origin="/somewhere")
    folder = importlib.machinery.ModuleSpec("wandb", None)  # what a run of wandb leaves in the working directory
    found = {"tensorboardX": installed, "wandb": folder}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    with pytest.raises(ShearingError, match=r"pip install wandb mlflow$"):
        require_trackers(recipe.training)
    require_trackers(load_recipe(tiny_recipe).training)


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first_step, last_step, value in ((1, 5, 1.0), (4, 6, 2.0)):
        trackers = open_trackers("tensorboard", folder=tmp_path, first_step=first_step)
        for step in range(first_step, last_step + 1):
            trackers.log({"step": step, "loss": value})
        trackers.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "demo-prune")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
        (5, 2.0),
        (6, 2.0),
    ]


def test_wandb_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for first_step in (1, 3):
        trackers = open_trackers("wandb", folder=tmp_path, first_step=first_step)
        trackers.log({"step": first_step, "loss": 1.0})
        trackers.close()
    identity = json.loads((tmp_path / "demo-prune.json").read_text())["wandb"]
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    assert all(run.name.endswith(identity) for run in runs)


def test_mlflow_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for first_step in (1, 3):
        trackers = open_trackers("mlflow", folder=tmp_path, first_step=first_step)
        for step in range(first_step, first_step + 2):
            trackers.log({"step": step, "loss": 1.0})
        trackers.close()
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string=f"name = '{PROJECT}'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4]
    assert run.data.params["prune.betas"] == "[0.9, 0.95]"
