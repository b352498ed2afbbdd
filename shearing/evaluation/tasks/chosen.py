"""Tasks by the names that people give, with presets of published sets. Imports neither torch nor the harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ChosenTask:
    """A task of the harness and how it is asked.

    Attributes:
        name: of a task, a group or a tag of the harness.
        fewshot: examples before each question; None: as many as the task itself says.
        metric: the one that tables show; None: the first that the task has of `SHOWN_METRICS`.
    """

    name: str
    fewshot: int | None = None
    metric: str | None = None


SHOWN_METRICS = ("acc_norm", "acc", "exact_match", "f1")
"""In the order in which tables prefer them; another metric is shown where a task has none of these."""

PRESETS = {
    # Sheared LLaMA (arXiv 2310.06694), section 3.1 and table 2, in its order.
    "paper11": (
        ChosenTask("sciq", 0, "acc"),
        ChosenTask("piqa", 0, "acc"),
        ChosenTask("winogrande", 0, "acc"),
        ChosenTask("arc_easy", 0, "acc"),
        ChosenTask("arc_challenge", 25, "acc_norm"),
        ChosenTask("hellaswag", 10, "acc_norm"),
        ChosenTask("logiqa", 0, "acc"),
        ChosenTask("boolq", 32, "acc"),
        ChosenTask("lambada_openai", 0, "acc"),
        ChosenTask("nq_open", 32, "exact_match"),
        ChosenTask("mmlu", 5, "acc"),
    ),
}


_METRICS = {task.name: task.metric for tasks in PRESETS.values() for task in tasks}
"""What is shown of a task is the same whether a preset or its own name asks for it."""


def chosen_tasks(names: Sequence[str], *, fewshot: int | None = None) -> tuple[ChosenTask, ...]:
    """The tasks of a list of names, presets unfolded, each once.

    Args:
        names: of tasks of the harness, or of `PRESETS`.
        fewshot: examples for all of them, whatever a preset says.
    """
    found: dict[str, ChosenTask] = {}
    for name in names:
        for task in PRESETS.get(name, (ChosenTask(name, metric=_METRICS.get(name)),)):
            found.setdefault(task.name, task if fewshot is None else replace(task, fewshot=fewshot))
    return tuple(found.values())
