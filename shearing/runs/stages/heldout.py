"""The losses on validation text that steer a run: of the source as reference, and of the model on its way."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from shearing.data.documents import Documents
from shearing.evaluation.heldout import heldout_loss
from shearing.processes.processes import Processes
from shearing.runs.context import RunContext
from shearing.runs.recipe import TrainingStage


def measure_heldout(
    context: RunContext,
    *,
    stage: TrainingStage,
    model: PreTrainedModel,
    advance: Callable[[int], None],
    objective: Callable[[Tensor, Documents | None], Tensor] | None = None,
    processes: Processes | None = None,
) -> dict[str, float]:
    """Mean loss of each domain's validation split, nats per token, on the subset that updates the mixture.

    Args:
        context: of the run.
        stage: whose micro-batch is taken.
        model: the model to measure.
        advance: called with the number of tokens just read.
        objective, processes: see `heldout_loss`.
    """
    recipe = context.recipe
    losses = heldout_loss(
        model,
        context.corpus,
        split="validation",
        tokens_per_domain=recipe.mixture.heldout_tokens,
        sequence_length=recipe.data.sequence_length,
        micro_batch_size=recipe.training_stages[stage].micro_batch_size,
        precision=context.precision,
        progress=advance,
        chunk_tokens=recipe.training.loss_chunk_tokens,
        rules=context.document_rules,
        objective=objective,
        processes=processes,
    )
    return {domain: loss.loss for domain, loss in losses.items()}


def heldout_tokens(context: RunContext) -> int:
    """Tokens that `measure_heldout` reads of all domains together."""
    recipe = context.recipe
    return context.corpus.heldout_tokens(
        split="validation",
        sequence_length=recipe.data.sequence_length,
        tokens_per_domain=recipe.mixture.heldout_tokens,
    )
