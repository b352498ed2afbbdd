"""The harness where it is installed, and what to type where it is not."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shearing.errors import ShearingError, key
from shearing.evaluation.tasks.chosen import ChosenTask

if TYPE_CHECKING:
    from shearing.evaluation.tasks.harness import Harness

EXTRA = "lm-eval"


def open_harness(tasks: Sequence[ChosenTask], *, folder: Path | None) -> Harness:
    """The harness with these tasks.

    Args:
        tasks: all that will be asked for.
        folder: of tasks beside the harness's own; None: no other.

    Raises:
        ShearingError: it is not installed, there is no folder, or no task of a name.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ShearingError(
            "tasks",
            value="the package lm_eval is not installed",
            allowed=f"the packages of shearing[{EXTRA}]",
            mend=f"pip install 'shearing[{EXTRA}]', or set {key('tasks')}=[]",
        )
    if folder is not None and not folder.is_dir():
        raise ShearingError(
            "task_folder",
            value=str(folder),
            allowed="a folder of tasks: YAML files of the lm-evaluation-harness",
            mend="correct the path; the demo's is made by `python -m data_tools.demo --output runs/demo-data`",
        )
    # Late: it takes seconds, and is not always installed.
    from shearing.evaluation.tasks.harness import Harness

    return Harness(folder=folder, names=[task.name for task in tasks])
