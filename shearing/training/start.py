"""How a stage gets under way: the model is prepared, and the newest checkpoint restored if there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from rich.console import Console

from shearing.data.mixture.prefetcher import Prefetcher
from shearing.errors import ShearingError
from shearing.processes.processes import AgreedEnd
from shearing.training.callbacks.standard import StandardCallbacks
from shearing.training.engines.engine import Engine
from shearing.training.metrics import Display
from shearing.training.stage import PREFETCHED_STEPS
from shearing.training.task import Run, Task


@contextmanager
def start(task: Task, *, callbacks: StandardCallbacks, console: Console) -> Iterator[Run]:
    """A run of `task`, from its newest checkpoint or from the start; all that it has opened is closed in the end.

    Args:
        task: what is trained.
        callbacks: those that every stage has.
        console: where messages and progress go.
    """
    processes, engine, schedule = task.processes, task.engine, task.schedule
    every = callbacks.around(task.callbacks)
    with ExitStack() as opened:
        opened.push(partial(_close, engine))
        for callback in every:
            opened.callback(callback.close)
            callback.open()
        newest = callbacks.checkpoints.newest()
        if newest is None and task.before_first_step is not None:
            task.before_first_step()
        model = engine.prepare(task.objective)
        model.train()
        if task.moving is not None:
            engine.move_masks(task.moving)
        step = 0
        if newest is not None:
            step = callbacks.checkpoints.restore(newest, callbacks=every)
            console.print(f"continuing {task.name} from step {step} ({newest})", soft_wrap=True)
        elif task.moments is not None:
            engine.load_moments(task.moments)
        processes.on_main(partial(_require_settled, task, step=step))
        if task.kept is not None:
            engine.keep_zeros(task.kept())
        prefetcher = Prefetcher(
            task.mixture,
            # Of no steps nothing is taken: then the batch need not be one that the processes can share.
            sequences_per_step=schedule.sequences_per_step if schedule.total_steps else processes.size,
            rank=processes.rank,
            world_size=processes.size,
            depth=PREFETCHED_STEPS,
        )
        opened.callback(prefetcher.close)
        display = Display(task.name, total_steps=schedule.total_steps, done_steps=step, console=console)
        run = Run(
            task=task,
            model=model,
            callbacks=every,
            prefetcher=prefetcher,
            console=console,
            display=display,
            step=step,
            unfinished=callbacks.checkpoints.unfinished,
            heed=callbacks.stop.heed,
        )
        for callback in every:
            callback.start(run)
        opened.enter_context(display)
        yield run


def _require_settled(task: Task, *, step: int) -> None:
    """No step is computed again that other settings have computed."""
    if step < task.settled_steps:
        raise ShearingError(
            "folder",
            value=f"{task.checkpoints}: the newest whole checkpoint is of step {step}",
            allowed=f"one of step {task.settled_steps} or later, from which on settings are others than before",
            mend="put that checkpoint back, or extend a copy of the run as it was before the change",
        )


def _close(engine: Engine, _kind: object, error: BaseException | None, _trace: object) -> None:
    """Last of all; not after an error of this process alone: closing waits for a device that may wait for others."""
    if error is None or isinstance(error, AgreedEnd):
        engine.close()
