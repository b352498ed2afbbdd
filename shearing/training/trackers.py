"""Trackers: what metrics.jsonl says, sent on to TensorBoard, Weights & Biases, MLflow or trackio as well.

The trackers are accelerate's own, without an Accelerator. metrics.jsonl stays the record of a run: it is cut back when
a run continues, a tracker cannot be.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from typing_extensions import Self

from shearing.errors import ShearingError
from shearing.files.durable import read_json, write_json
from shearing.training.recipe import TrainingRecipe

logger = logging.getLogger(__name__)

PROJECT = "shearing"
"""Project or experiment of all runs, where a tracker has such a thing and its environment variable names no other."""

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
"""What else than a package of the tracker's own name will do."""


def require_trackers(training: TrainingRecipe) -> None:
    """Check that the packages of `training.trackers` are there, without importing them.

    Raises:
        ShearingError: one is not; it says what to type.
    """
    missing = [name for name in training.trackers if not any(map(_is_installed, _PACKAGES.get(name, (name,))))]
    if missing:
        raise ShearingError(
            "trackers",
            value=training.trackers,
            allowed=f"trackers whose packages are installed; not here: {', '.join(missing)}",
            mend=f"{sys.executable} -m pip install {' '.join(missing)}",
        )


class Trackers:
    """The open trackers of one stage; made by `open`.

    A tracker that fails while the run goes on is left out from then on, with a warning: it is not worth a run.
    """

    def __init__(self, trackers: Mapping[str, Any]) -> None:
        self._trackers = dict(trackers)

    @classmethod
    def open(
        cls, names: Sequence[str], *, run_name: str, folder: Path, configuration: Mapping[str, Any], first_step: int
    ) -> Self:
        """Open trackers; on all processes but the main one, nothing is opened and nothing logged.

        To be called after the processes have met, on every one of them or on the main one alone.

        Trackers only ever append. When a run continues from a checkpoint, the steps between that checkpoint and the
        interruption come a second time, and:

        - TensorBoard hides what it had at `first_step` and later, so that each step appears once;
        - Weights & Biases keeps the first of two values for a step (it takes no step lower than its last);
        - MLflow and trackio keep both.

        Both values are the same to the bit, except for timings.

        Args:
            names: of accelerate's trackers; a repeated name counts once.
            run_name: what the run is called there, with the stage in it: steps of each stage begin at 1.
            folder: where local files go (`run_dir/trackers`): tensorboard/, wandb/, mlflow.db and mlflow/. trackio has
                its own place (TRACKIO_DIR). MLFLOW_TRACKING_URI, WANDB_PROJECT and the like win.
            configuration: dotted key -> value, as `Recipe.flat` gives it; stored where the run begins, not where it
                continues.
            first_step: the first step that will be logged.

        Raises:
            ShearingError: a tracker does not start where the run begins: its package or its account is missing. Where
                the run continues, that is said, and the run goes on without it.
        """
        if not names or (dist.is_initialized() and dist.get_rank() != 0):
            return cls({})
        from accelerate import PartialState  # late: it takes a second, and few runs have trackers
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's trackers say what they do to its logger, which asks for this
        run_name = re.sub(r"[^\w.-]+", "-", run_name).strip(".") or PROJECT
        known = folder / f"{run_name}.json"
        identities: dict[str, Any] = read_json(known) if known.is_file() else {}
        opened = cls({})
        for name in dict.fromkeys(names):
            begins = name not in identities
            identity = identities.get(name, uuid.uuid4().hex[:12])
            arguments = _arguments(
                name,
                run_name=run_name,
                folder=folder.absolute(),
                identity=identity,
                begins=begins,
                first_step=first_step,
            )
            try:
                tracker = LOGGER_TYPE_TO_CLASS[name](**arguments)
                tracker.start()
                if begins:
                    tracker.store_init_configuration({key: _plain(value) for key, value in configuration.items()})
            except Exception as error:  # each has classes of its own
                if not begins:
                    logger.warning("%s does not start, metrics.jsonl has what it lacks of this run: %s", name, error)
                    continue
                opened.close()
                raise ShearingError(
                    "trackers",
                    value=name,
                    allowed="trackers that start",
                    mend=f"it says: {error or type(error).__name__}; mend that, or take {name} out",
                ) from error
            opened._trackers[name] = tracker
            # MLflow chooses for itself.
            write_json(known, identities := {**identities, name: _run_id(tracker) if name == "mlflow" else identity})
        return opened

    def log(self, record: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl at its `step`.

        Nested figures are called `expected/hidden`; those of a line with an `event`, `mixture/losses/books`. What is no
        finite number is left out.
        """
        if not self._trackers:
            return
        prefix = f"{record['event']}/" if "event" in record else ""
        values = {prefix + name: value for name, value in _numbers(record) if name != "step"}
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, partial(tracker.log, values, step=record["step"]))

    def close(self) -> None:
        """Send what is still to be sent, and close; more than once does nothing."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.finish)
        self._trackers.clear()

    def _attempt(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001  the network, the server, the disk: anything
            del self._trackers[name]
            logger.warning("%s failed and gets no more of this run, metrics.jsonl has all of it: %s", name, error)


def _arguments(
    name: str, *, run_name: str, folder: Path, identity: str, begins: bool, first_step: int
) -> dict[str, Any]:
    """What accelerate's class of tracker `name` is made with, so that the run of `identity` begins or continues."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "tensorboard":
        return {"run_name": run_name, "logging_dir": str(folder / "tensorboard"), "purge_step": first_step}
    if name == "wandb":
        # accelerate's `run_name` is the tracker's project.
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return {"run_name": project, "name": run_name, "id": identity, "dir": str(folder), "resume": "allow"}
    if name == "mlflow":
        # Its own default is the working directory; it reads this when it is imported.
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        artifacts = (folder / "mlflow").as_uri()
        run_id = None if begins else identity
        return {"experiment_name": PROJECT, "logging_dir": artifacts, "run_id": run_id, "run_name": run_name}
    # trackio knows a run by its name alone, and another folder may have a run of the same name.
    return {"run_name": PROJECT, "name": f"{run_name}-{identity}", "resume": "allow"}


def _run_id(tracker: Any) -> str:
    return str(tracker.tracker.info.run_id)


def _numbers(record: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, prefix=f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{name}", value


def _plain(value: Any) -> bool | int | float | str | None:
    """What all trackers take for a setting."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


def _is_installed(package: str) -> bool:
    # A folder of that name in the working directory, as wandb makes one, is no package; it has no origin.
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None
