"""The lm-evaluation-harness in this process: any model that is loaded, its requests shared out over processes.

Needs the package lm_eval; everything else of the library can do without this module.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shearing.errors import ShearingError, key
from shearing.evaluation.tasks.chosen import SHOWN_METRICS, ChosenTask
from shearing.models.stored.paging.shared_out import passes_of_all
from shearing.processes.processes import Processes

_SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""Those of the harness's own command."""

_DRAWS = 1000
"""For standard errors that have no formula: perplexity, F1. Accuracies have one."""


class Harness:
    """Tasks that are found, with their text.

    Args:
        folder: of tasks (YAML) beside the harness's own; its names come first.
        names: of all tasks that will be asked for: where the folder has them all, the 15,000 files of the harness's
            own tasks are not looked through.

    Raises:
        ShearingError: no task of a name.
    """

    def __init__(self, *, folder: Path | None, names: Sequence[str]) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        path = None if folder is None else str(folder)
        manager = TaskManager(include_path=path, include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=path)
        self._manager = manager
        self._loaded: dict[str, Any] = {}
        for name in names:
            if name not in manager.all_tasks:
                near = " or ".join(difflib.get_close_matches(name, manager.all_tasks, n=3))
                raise ShearingError(
                    "tasks",
                    value=name,
                    allowed="tasks of the lm-evaluation-harness (`lm_eval ls tasks`), of the folder of "
                    f"{key('task_folder')}, or a preset",
                    mend=f"is it {near}?" if near else "correct the name",
                )

    def load(self, name: str) -> Any:
        """A task, group or tag with its text, which is fetched where it is not here yet.

        Raises:
            ShearingError: its text is not to be had.
        """
        if name not in self._loaded:
            try:
                with _quiet():
                    self._loaded[name] = self._manager.load([name])
            except Exception as error:
                raise ShearingError(
                    "tasks",
                    value=f"{name}: {(str(error).splitlines() or [type(error).__name__])[0]}",
                    allowed="tasks whose data is on this machine or can be fetched",
                    mend="connect to the hub once, or name a folder of tasks with their data: " + key("task_folder"),
                ) from error
        return self._loaded[name]

    def measure(
        self,
        model: PreTrainedModel,
        task: ChosenTask,
        *,
        tokenizer: PreTrainedTokenizerBase,
        limit: int | None = None,
        batch_size: int = 8,
        precision: torch.dtype | None = None,
        processes: Processes | None = None,
    ) -> dict[str, dict[str, Any]]:
        """What a model reaches on a task, as the harness's own command would say.

        Args:
            model: a causal language model on its device; with several processes, the same one on each, or one whose
                layers they share.
            task: of those that this was made with.
            tokenizer: the model's.
            limit: questions of each task, the first ones; None: all.
            batch_size: requests in one forward pass.
            precision: dtype of autocast; None or float32: the dtype of the parameters.
            processes: those that share out the questions; all have to call this, and all get the result.

        Returns:
            By name of the task, or of each task of a tag: `metric` (the one that is shown), `value`, `stderr` (null
            where there is none), `items` (questions), `fewshot`, `version`, and `metrics`: every metric by name, with
            `value`, `stderr` and `higher_is_better`.

        Raises:
            ShearingError: see `load`.
        """
        loaded = self.load(task.name)
        for each in loaded["tasks"].values():
            _set_fewshot(each, task.fewshot)
        random.seed(_SEEDS["python"])
        np.random.seed(_SEEDS["numpy"])
        torch.manual_seed(_SEEDS["torch"])
        shared = processes or Processes()
        with _quiet():
            lm = _Shared(model, tokenizer=tokenizer, batch_size=batch_size, precision=precision, processes=shared)
            results = evaluate(lm, loaded, limit=limit, bootstrap_iters=_DRAWS, log_samples=False)
        return _content(results, task, loaded=loaded)


class _Shared(HFLM):  # type: ignore[misc]
    """A model that is loaded; each process answers the requests of its own questions, and all have all answers.

    The harness has a way of its own to share out questions, which draws other examples for them than one process does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        precision: torch.dtype | None,
        processes: Processes,
    ) -> None:
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # it may be given a token for padding
            batch_size=batch_size,
            mixed_precision_dtype=None if precision is torch.float32 else precision,
        )
        self._processes = processes

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[Any]:
        return self._shared_out(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[Any]:
        return self._shared_out(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], **_: Any) -> list[Any]:
        return self._shared_out(super().generate_until, requests)

    def _shared_out(self, answer: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
        """By question, as the choices of one have their context in common and are answered together."""
        size = self._processes.size
        mine = [request for request in requests if request.doc_id % size == self._processes.rank]
        with passes_of_all(self.model, processes=self._processes):
            answers = answer(mine, disable_tqdm=True) if mine else []
        parts = [iter(part) for part in self._processes.gather(answers)]
        return [next(parts[request.doc_id % size]) for request in requests]


def _set_fewshot(task: Any, wanted: int | None) -> None:
    """As the harness's command does: a task that says 0 keeps it, one that says nothing has 0."""
    own = task.get_config("num_fewshot")
    if wanted is not None and own != 0:
        task.set_config(key="num_fewshot", value=wanted)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEEDS["fewshot"])


def _content(results: Mapping[str, Any], task: ChosenTask, *, loaded: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    # A tag is a list of tasks without a figure of its own; a group that aggregates has one.
    names = [task.name] if task.name in results["results"] else list(loaded["tasks"])
    content = {}
    for name in names:
        metrics = dict(_metrics(results, name))
        leaves = [name] if name in loaded["tasks"] else list(loaded["tasks"])
        shown = next((each for each in (task.metric, *SHOWN_METRICS) if each in metrics), next(iter(metrics)))
        content[name] = {
            "metric": shown,
            **{part: metrics[shown][part] for part in ("value", "stderr")},
            "items": sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
            "fewshot": results["n-shot"].get(leaves[0]),
            "version": results["versions"].get(name),
            "metrics": metrics,
        }
    return content


def _metrics(results: Mapping[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Metrics of a task, the first filter of each: `acc,none` and `acc_stderr,none` are one."""
    of_task = results["results"][name]
    seen = set()
    for name_of_figure, value in of_task.items():
        metric, comma, kind = name_of_figure.partition(",")
        if not comma or metric.endswith("_stderr") or metric in seen:
            continue
        seen.add(metric)
        error = of_task.get(f"{metric}_stderr,{kind}")
        better = results["higher_is_better"].get(name, {}).get(metric, True)
        yield metric, {"value": _finite(value), "stderr": _finite(error), "higher_is_better": better}


def _finite(value: Any) -> float | None:
    """A number as JSON has it; the harness says "N/A" where it has none."""
    if isinstance(value, str) or value is None or not math.isfinite(value):
        return None
    return float(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's bars and prints, and without a pool of processes beside ours."""
    variable = "DISABLE_MULTIPROC"
    before = os.environ.get(variable)
    bars = datasets.are_progress_bars_disabled()
    os.environ[variable] = "1"
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
        if not bars:
            datasets.enable_progress_bars()
