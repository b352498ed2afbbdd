"""Held-out loss per domain on fixed rows: nats per token, perplexity, bits per byte.

Shapes: B rows, T = S + 1 tokens (S inputs, S labels), d hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shearing.evaluation.text_bytes import token_bytes
from shearing.models.anatomy import backbone, head_weight
from shearing.models.masked import MaskedModel
from shearing.training.objectives import per_token_loss
from shearing.training.processes import Processes

if TYPE_CHECKING:
    from shearing.mixture.corpus import Corpus


@dataclass(frozen=True)
class DomainLoss:
    """The loss of a model on the held-out text of one domain.

    Attributes:
        loss: mean negative log-likelihood, nats per token.
        perplexity: exp(loss).
        bits_per_byte: total negative log-likelihood in bits over bytes of text; None without a tokenizer that tells.
        tokens: number of predicted tokens.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int


def heldout_loss(
    model: PreTrainedModel | MaskedModel,
    corpus: Corpus,
    *,
    tokens_per_domain: int,
    sequence_length: int,
    micro_batch_size: int,
    precision: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int], None] | None = None,
    chunk_tokens: int = 1024,
    objective: Callable[[Tensor], Tensor] | None = None,
    processes: Processes | None = None,
) -> dict[str, DomainLoss]:
    """Mean loss of a model on the same held-out rows of every domain, every time it is called.

    The sums stay on the device and are read once at the end; logits exist for `chunk_tokens` tokens at a time. The
    model is put into eval mode and back.

    Args:
        model: a Hugging Face causal language model, or a `MaskedModel` with its masks set by the caller.
        corpus: tokenised domains.
        tokens_per_domain: held-out tokens read per domain, in whole rows; fewer where the domain has fewer.
        sequence_length: tokens of context at the end of a row (S).
        micro_batch_size: rows per forward pass (B).
        precision: dtype of autocast; None or float32: the dtype of the parameters.
        tokenizer: the model's tokenizer, for bits per byte.
        progress: called with the number of tokens just evaluated.
        chunk_tokens: tokens whose logits exist at the same time.
        objective: sum of the loss over tokens [B, T], where the model's own modules cannot be called one by one
            (sharded weights).
        processes: those that share out the rows; all have to call this, and all get the result.

    Returns:
        One `DomainLoss` per domain, in the order of the corpus.
    """
    causal_lm = model.model if isinstance(model, MaskedModel) else model
    processes = processes or Processes()
    device = head_weight(causal_lm).device
    count_bytes = None if tokenizer is None else token_bytes(tokenizer, vocab_size=causal_lm.config.vocab_size)
    count_bytes = None if count_bytes is None else count_bytes.to(device)
    objective = objective or partial(_sum_of_losses, causal_lm, chunk_tokens=chunk_tokens)

    domains = list(corpus.domains)
    loss_sums = torch.zeros(len(domains), dtype=torch.float64, device=device)
    byte_sums = torch.zeros(len(domains), dtype=torch.int64, device=device)
    tokens = [0] * len(domains)

    was_training = model.training
    model.train(False)
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, dtype=precision, enabled=precision not in (None, torch.float32)),
        ):
            for index, domain in enumerate(domains):
                batches = corpus.heldout_batches(
                    domain,
                    sequence_length=sequence_length,
                    tokens=tokens_per_domain,
                    micro_batch_size=micro_batch_size,
                )
                number, batch_BT = -1, None
                for number, batch_BT in enumerate(batches):
                    tokens[index] += batch_BT[:, 1:].numel()
                    if number % processes.size == processes.rank:
                        batch_BT = batch_BT.to(device, non_blocking=True)
                        loss_sums[index] += objective(batch_BT).to(torch.float64)
                        if count_bytes is not None:
                            byte_sums[index] += count_bytes.count(batch_BT)
                    if progress is not None:
                        progress(batch_BT[:, 1:].numel())
                left_over = (number + 1) % processes.size
                if batch_BT is not None and left_over and processes.rank >= left_over:
                    objective(batch_BT.to(device))  # sharded weights come together only if all processes take part
        processes.sum(loss_sums)
        processes.sum(byte_sums)
    finally:
        model.train(was_training)

    return {
        domain: _domain_loss(loss_sum, num_bytes=num_bytes, tokens=num_tokens)
        for domain, loss_sum, num_bytes, num_tokens in zip(
            domains, loss_sums.tolist(), byte_sums.tolist(), tokens, strict=True
        )
    }


def _sum_of_losses(model: PreTrainedModel, batch_BT: Tensor, *, chunk_tokens: int) -> Tensor:
    hidden_BSD = backbone(model)(input_ids=batch_BT[:, :-1], use_cache=False).last_hidden_state
    loss_BS = per_token_loss(hidden_BSD, head_weight(model), batch_BT[:, 1:], chunk_tokens=chunk_tokens)
    return loss_BS.sum(dtype=torch.float64)


def macro_mean(losses: Mapping[str, DomainLoss]) -> DomainLoss:
    """The mean over domains, each domain counted once: mean loss, its exponential, mean bits per byte, all tokens.

    Args:
        losses: at least one domain.
    """
    loss = sum(domain.loss for domain in losses.values()) / len(losses)
    bits = [domain.bits_per_byte for domain in losses.values() if domain.bits_per_byte is not None]
    return DomainLoss(
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=sum(bits) / len(bits) if len(bits) == len(losses) else None,
        tokens=sum(domain.tokens for domain in losses.values()),
    )


def _domain_loss(loss_sum: float, *, num_bytes: int, tokens: int) -> DomainLoss:
    loss = loss_sum / tokens if tokens else math.nan
    bits_per_byte = loss_sum / math.log(2) / num_bytes if num_bytes else None
    return DomainLoss(loss=loss, perplexity=_exp(loss), bits_per_byte=bits_per_byte, tokens=tokens)


def _exp(loss: float) -> float:
    # math.exp raises beyond 709 nats; a model that is that wrong has infinite perplexity.
    return math.exp(loss) if not loss > 700 else math.inf
