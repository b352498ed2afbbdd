"""What a model is worth in a race: its loss on test text, by domain and in the mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import HeldOutSplit
from shearing.evaluation.heldout import heldout_loss, macro_mean
from shearing.files.durable import finite_or_none
from shearing.models.attention import requested
from shearing.models.masked import MaskedModel
from shearing.progress import activity
from shearing.runs.context import RunContext

SPLIT: HeldOutSplit = "test"
"""What judges: no method and no constant was chosen on it. What goes on to a longer race is chosen on `validation`."""


def load_model(folder: Path, *, context: RunContext) -> PreTrainedModel:
    """A stored model in fp32, where the context computes."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=requested(context.recipe.model.attn_implementation)
    )
    model.to(context.device)  # type: ignore[arg-type]
    return model


def losses_of(
    model: PreTrainedModel | MaskedModel, *, context: RunContext, split: HeldOutSplit = SPLIT
) -> dict[str, Any]:
    """Losses of a model, masked or not.

    Args:
        model: on the context's device.
        context: says of which text.
        split: of it; what chooses is measured on `validation`, which has no text of other domains.

    Returns:
        `mean` over domains and `domains`, nats per token; with text of no training domain `outside_mean` and `outside`
        too. Null where a loss is not finite.
    """
    found = _of_corpus(model, context.corpus, context=context, split=split)
    if context.outside is None or split != SPLIT:
        return found
    outside = _of_corpus(model, context.outside, context=context, split=split)
    return {**found, "outside_mean": outside["mean"], "outside": outside["domains"]}


def _of_corpus(
    model: PreTrainedModel | MaskedModel, corpus: Corpus, *, context: RunContext, split: HeldOutSplit
) -> dict[str, Any]:
    recipe = context.recipe
    evaluation, length = recipe.evaluation, recipe.data.sequence_length
    total = corpus.heldout_tokens(split=split, sequence_length=length, tokens_per_domain=evaluation.tokens_per_domain)
    with activity(f"{split} losses", total=total, console=context.console) as advance:
        losses = heldout_loss(
            model,
            corpus,
            split=split,
            tokens_per_domain=evaluation.tokens_per_domain,
            sequence_length=length,
            micro_batch_size=evaluation.micro_batch_size,
            precision=context.precision,
            progress=advance,
            chunk_tokens=recipe.training.loss_chunk_tokens,
            rules=context.document_rules,
        )
    return {
        "mean": finite_or_none(macro_mean(losses).loss),
        "domains": {domain: finite_or_none(loss.loss) for domain, loss in losses.items()},
    }
