"""The training loop of both stages; what goes on around its steps is done by callbacks.

Every process runs it; what they do together is the same in number and order on all of them.

Shapes: B sequences of a step on this process, T = S + 1 tokens of a row (S inputs and the last label), M domains, K
measures of the objective.
"""

from __future__ import annotations

import torch
from rich.console import Console
from torch import Tensor, nn

from shearing.data.documents import sent
from shearing.data.mixture.origins import Origins
from shearing.data.mixture.sampler import Batch
from shearing.objectives.objective import Losses
from shearing.processes.stop import StopAsked
from shearing.training.callbacks.standard import StandardCallbacks
from shearing.training.stage import Interrupted, Trained
from shearing.training.start import start
from shearing.training.task import Run, StepResult, Task


def train(task: Task, *, console: Console, measure_end: bool = False) -> Trained:
    """Train from the newest checkpoint, or from the start, to the end of the stage.

    A step is a function of the recipe and its number: continued at any point, it is the same to the bit.

    Args:
        task: what to train, and with what.
        console: where progress goes.
        measure_end: measure held-out losses after the last step.

    Raises:
        Interrupted: SIGTERM, SIGINT or SIGUSR1 on any process; the step was finished and a checkpoint written. What
            was measured behind the step is measured where the run continues.
        ShearingError: too many non-finite steps in a row, or no space for a checkpoint.
    """
    callbacks = StandardCallbacks.of(task, measure_end=measure_end)
    with start(task, callbacks=callbacks, console=console) as run:
        try:
            run.finish_step()
            while run.step < task.schedule.total_steps:
                run.before_step()
                loss, domains = _forward_backward(task, run.model, run.prefetcher.next(), step=run.step)
                skipped = _update(task, step=run.step)
                run.after_step(StepResult(loss=loss, domains=domains, skipped=skipped))
                if run.stopping and (not run.ends or run.unfinished):
                    raise _stopped(run, by=run.stopping)
            run.end()
            if late := callbacks.stop.after_last_step():
                raise _stopped(run, by=late)
        except StopAsked as asked:  # in what is measured behind a step that is saved
            raise _stopped(run, by=asked.signal) from None
    return callbacks.trained()


def _stopped(run: Run, *, by: str) -> Interrupted:
    run.console.print(f"{by}: stopped after step {run.step}; the same command continues from there")
    return Interrupted()


def _forward_backward(task: Task, model: nn.Module, batch: Batch, *, step: int) -> tuple[Tensor, Tensor]:
    """Accumulate the gradients of one step; `loss` and `domains` of its `StepResult`."""
    device, schedule, size = task.engine.device, task.schedule, task.schedule.micro_batch_size
    tokens_BT, domain_ids_B = (sent(tensor, device=device) for tensor in (batch.tokens, batch.domain_ids))
    num_valid = batch.num_labels
    if num_valid is None:  # rows of a corpus are full: every position has a label
        num_valid = schedule.sequences_per_step * (tokens_BT.shape[1] - 1)
    offset = task.processes.rank * tokens_BT.shape[0]
    total = torch.zeros((), device=device)
    places_B2 = torch.stack([batch.domain_ids, batch.rows], 1)
    of_rows: list[Tensor] = []
    micro_batches = tokens_BT.split(size)
    for index, micro_BT in enumerate(micro_batches):
        first = index * size
        if task.masking is not None:
            task.masking.draw(step=step, sequence=offset + first, of=schedule.sequences_per_step)
        positions_BT = None if batch.positions is None else batch.positions[first : first + size]
        counted_BT = None if batch.counted is None else batch.counted[first : first + size]
        documents = task.mixture.documents.documents(positions_BT, device=device, counted_BT=counted_BT)
        origins = Origins(domains=domain_ids_B[first : first + size], places=places_B2[first : first + size])
        with task.engine.autocast():
            losses: Losses = model(micro_BT, documents, origins)
            loss = losses.total / max(1, num_valid)  # rows of questions alone have no label, and nothing to learn
        task.engine.backward(loss, last=index + 1 == len(micro_batches))
        total += loss.detach()
        of_rows.append(torch.column_stack([losses.rows.double(), losses.labels.double(), losses.measured.double()]))
    if task.masking is not None:
        task.masking.after_backward(step=step, scale=task.engine.loss_scale)
    return total, _by_domain(torch.cat(of_rows), domain_ids_B, num_domains=len(task.mixture.domains))


def _by_domain(rows_BK: Tensor, domain_ids_B: Tensor, *, num_domains: int) -> Tensor:
    """Sums of rows by domain, [M, 2 + K]; in a fixed order, and what is not finite stays in its domain."""
    domains_M1 = torch.arange(num_domains, device=domain_ids_B.device)[:, None]
    return torch.where((domain_ids_B == domains_M1)[..., None], rows_BK, 0.0).sum(1)


def _update(task: Task, *, step: int) -> Tensor:
    """One optimiser step of weights and masks; returns whether it was skipped, on the device."""
    skipped = task.engine.step(step=step)
    return skipped if task.masking is None else task.masking.update(step=step, skip=skipped)
