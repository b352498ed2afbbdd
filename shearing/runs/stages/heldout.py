"""The losses on validation text that steer a run: of the source as reference, and of the model on its way."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from shearing.data.documents import Documents
from shearing.evaluation.heldout import heldout_loss
from shearing.files.durable import read_json
from shearing.processes.processes import Processes
from shearing.runs.context import RunContext
from shearing.runs.recipe import TrainingStage

REFERENCE = "reference.json"
"""File of the first stage that trains: the reference loss of each domain."""

REFERENCE_TOKENS = "reference_tokens.json"
"""Beside it, where the source has set it: `tokens_per_domain` of what it read. A run of an earlier version has none."""


def measure_heldout(
    context: RunContext,
    *,
    stage: TrainingStage,
    model: PreTrainedModel,
    tokens: int,
    advance: Callable[[int], None],
    objective: Callable[[Tensor, Documents | None], Tensor] | None = None,
    processes: Processes | None = None,
    require_labels: bool = True,
) -> dict[str, float]:
    """Mean loss of each domain's validation split, nats per token.

    Args:
        context: of the run.
        stage: whose micro-batch is taken.
        model: the model to measure.
        tokens: of each domain, from the beginning of its split; those that update the mixture are `steering_tokens`.
        advance: called with the number of tokens just read.
        objective, processes, require_labels: see `heldout_loss`.
    """
    recipe = context.recipe
    losses = heldout_loss(
        model,
        context.corpus,
        split="validation",
        tokens_per_domain=tokens,
        sequence_length=recipe.data.sequence_length,
        micro_batch_size=recipe.training_stages[stage].micro_batch_size,
        precision=context.precision,
        progress=advance,
        chunk_tokens=recipe.training.loss_chunk_tokens,
        rules=context.document_rules,
        objective=objective,
        processes=processes,
        require_labels=require_labels,
    )
    return {domain: loss.loss for domain, loss in losses.items()}


def steering_tokens(context: RunContext) -> int:
    """Validation tokens of each domain that the mixture follows: those of the reference, where that has been measured.

    What `auto` means follows from durations and intervals, which may have changed since. All processes call this.
    """
    folder = context.directory.folder(next(iter(context.recipe.training_stages)))
    files = folder / REFERENCE, folder / REFERENCE_TOKENS

    def kept() -> int | None:
        return int(read_json(files[1])["tokens_per_domain"]) if all(file.is_file() for file in files) else None

    return context.processes.on_main(kept) or context.recipe.heldout_tokens(domains=len(context.corpus.domains))


def tokens_of_all(context: RunContext, *, tokens: int) -> int:
    """Tokens that `measure_heldout` reads of all domains together, at so many of each; a domain may have fewer."""
    return context.corpus.heldout_tokens(
        split="validation", sequence_length=context.recipe.data.sequence_length, tokens_per_domain=tokens
    )
