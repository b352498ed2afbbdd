"""Held-out loss per domain on fixed rows: nats per token, perplexity, bits per byte.

Shapes: B rows, T = S + 1 tokens (S inputs, S labels), d hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shearing.data.corpus.corpus import Corpus, whole_rows
from shearing.data.corpus.format import HeldOutSplit
from shearing.data.documents import DocumentRules, Documents, Inputs
from shearing.errors import ShearingError
from shearing.evaluation.text_bytes import token_bytes
from shearing.models.anatomy import head_of, head_weight
from shearing.models.attention import attention_within_documents
from shearing.models.masked import MaskedModel
from shearing.models.stored.paging.on_demand import weights_here
from shearing.models.stored.paging.passing import last_states
from shearing.objectives.cross_entropy import per_token_loss
from shearing.processes.processes import Processes


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

    def to_json(self) -> dict[str, float | int | None]:
        """By name; JSON has no NaN and no infinity: a model that diverged has null there."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def heldout_loss(
    model: PreTrainedModel | MaskedModel,
    corpus: Corpus,
    *,
    split: HeldOutSplit,
    tokens_per_domain: int,
    sequence_length: int,
    micro_batch_size: int,
    precision: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int], None] | None = None,
    chunk_tokens: int = 1024,
    rules: DocumentRules | None = None,
    objective: Callable[[Tensor, Documents | None], Tensor] | None = None,
    processes: Processes | None = None,
    require_labels: bool = True,
) -> dict[str, DomainLoss]:
    """Mean loss of a model on the same held-out rows of every domain, every time it is called.

    The sums stay on the device and are read once at the end; logits exist for `chunk_tokens` tokens at a time. The
    model is put into eval mode and back.

    Args:
        model: a Hugging Face causal language model, or a `MaskedModel` with its masks set by the caller; whole, or with
            weights that come on demand (see `last_states`).
        corpus: tokenised domains.
        split: validation where something is chosen by what is found, test where a result is judged.
        tokens_per_domain: held-out tokens read per domain, in whole rows; fewer where the domain has fewer.
        sequence_length: tokens of context at the end of a row (S).
        micro_batch_size: rows per forward pass (B), at most: fewer where that leaves processes without any.
        precision: dtype of autocast; None or float32: the dtype of the parameters.
        tokenizer: the model's tokenizer, for bits per byte.
        progress: called with the number of tokens just evaluated by all processes, on each of them behind equally many
            of its passes.
        chunk_tokens: tokens whose logits exist at the same time.
        rules: what the end of a document means; None: nothing.
        objective: sum of the loss over tokens [B, T] with their documents, where the model's own modules cannot be
            called one by one (sharded weights), or no family says which they are.
        processes: those that share out the rows; all have to call this, and all get the result.
        require_labels: of every domain; False: one of which no label counts has the loss NaN.

    Returns:
        One `DomainLoss` per domain, in the order of the corpus.

    Raises:
        ShearingError: what is read of a domain has no label that counts, though it has to.
    """
    causal_lm = model.model if isinstance(model, MaskedModel) else model
    rules = (rules or DocumentRules()).heeding(corpus.bos)
    processes = processes or Processes()
    device = head_weight(causal_lm).device if objective is None else causal_lm.device
    vocab_size = causal_lm.config.get_text_config().vocab_size
    count_bytes = None if tokenizer is None else token_bytes(tokenizer, vocab_size=vocab_size)
    count_bytes = None if count_bytes is None else count_bytes.to(device)
    sums = _Sums.of(len(corpus.domains), device=device)
    rows = _rows_of_all(
        corpus,
        split=split,
        rules=rules,
        device=device,
        processes=processes,
        progress=progress,
        sums=sums,
        settings={
            "sequence_length": sequence_length,
            "tokens": tokens_per_domain,
            "micro_batch_size": min(
                micro_batch_size, -(-whole_rows(tokens_per_domain, sequence_length=sequence_length) // processes.size)
            ),
        },
        every=objective is not None,
    )
    was_training = model.training
    model.train(False)
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, dtype=precision, enabled=precision not in (None, torch.float32)),
            attention_within_documents(causal_lm, on=rules.attention_within),
        ):
            if objective is None:
                losses = _losses_of(causal_lm, rows, chunk_tokens=chunk_tokens)
            else:
                losses = ((row, objective(row.tokens, row.documents)) for row in rows)
            for row, loss in losses:
                if row.counts:
                    sums.losses[row.domain] += loss.to(torch.float64)
                    if count_bytes is not None:
                        sums.bytes[row.domain] += count_bytes.count(
                            row.tokens,
                            leave_out_BS=None if row.documents is None else row.documents.left_out,
                            begins_B=None if row.begins is None else row.begins.to(device),
                        )
        processes.sum(sums.losses)
        processes.sum(sums.bytes)
    finally:
        model.train(was_training)

    for domain, num_tokens in zip(corpus.domains, sums.tokens, strict=True) if require_labels else ():
        _require_labels(num_tokens, corpus=corpus, domain=domain, split=split)
    return {
        domain: _domain_loss(loss_sum, num_bytes=num_bytes, tokens=num_tokens)
        for domain, loss_sum, num_bytes, num_tokens in zip(
            corpus.domains, sums.losses.tolist(), sums.bytes.tolist(), sums.tokens, strict=True
        )
    }


@dataclass(frozen=True)
class _Sums:
    """Of each domain: losses, fp64, and bytes, int64, on the device, of this process; and labels, of all."""

    losses: Tensor
    bytes: Tensor
    tokens: list[int]

    @classmethod
    def of(cls, domains: int, *, device: torch.device) -> _Sums:
        losses = torch.zeros(domains, dtype=torch.float64, device=device)
        return cls(losses, torch.zeros(domains, dtype=torch.int64, device=device), [0] * domains)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a domain on the device, their documents, and whether a document begins with a row.

    Attributes:
        tokens: [B, T].
        begins: [B].
        counts: whether their loss is this process's to count.
    """

    domain: int
    tokens: Tensor
    documents: Documents | None
    begins: Tensor | None
    counts: bool = True


def _rows_of_all(
    corpus: Corpus,
    *,
    split: HeldOutSplit,
    rules: DocumentRules,
    device: torch.device,
    processes: Processes,
    progress: Callable[[int], None] | None,
    sums: _Sums,
    settings: Mapping[str, int],
    every: bool,
) -> Iterator[_Rows]:
    """The rows of all domains that this process reads; counts the labels of all, in `sums`.

    Args:
        every: whether all processes have to read equally often, because sharded weights come together only if all take
            part: then some rows are read that do not count.
    """
    for index, domain in enumerate(corpus.domains):
        number, rows, passed = -1, None, 0
        batches = heldout_rows(corpus, domain, split=split, rules=rules, settings=settings)
        for number, (batch_BT, positions_BT, counted_BT, begins_B) in enumerate(batches):
            documents = rules.documents(positions_BT, device=device, counted_BT=counted_BT)
            sums.tokens[index] += _num_labels(batch_BT, positions_BT, counted_BT, rules=rules)
            rows = _Rows(index, batch_BT, documents, begins_B)
            if number % processes.size == processes.rank:
                yield replace(rows, tokens=batch_BT.to(device, non_blocking=True))
            passed += batch_BT[:, 1:].numel()
            if progress is not None and (number + 1) % processes.size == 0:
                # All have read equally often: who leaves it here, as all do, leaves nobody waiting for its weights.
                progress(passed)
                passed = 0
        left_over = (number + 1) % processes.size
        if every and rows is not None and left_over and processes.rank >= left_over:
            yield replace(rows, tokens=rows.tokens.to(device), counts=False)
        if progress is not None and passed:
            progress(passed)


def _losses_of(model: PreTrainedModel, rows: Iterable[_Rows], *, chunk_tokens: int) -> Iterator[tuple[_Rows, Tensor]]:
    """Rows, each with the sum of its losses."""
    under_way: deque[_Rows] = deque()

    def read() -> Iterator[Mapping[str, Any]]:
        for each in rows:
            under_way.append(each)
            yield Inputs(each.tokens[:, :-1], each.documents).keywords()

    head = head_of(model)
    for hidden_BSD in last_states(model, read()):
        each = under_way.popleft()
        labels_BS = each.tokens[:, 1:] if each.documents is None else each.documents.labels(each.tokens)
        with weights_here(head.weight):
            loss_BS = per_token_loss(hidden_BSD, head, labels_BS, chunk_tokens=chunk_tokens)
        yield each, loss_BS.sum(dtype=torch.float64)


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


def heldout_rows(
    corpus: Corpus,
    domain: str,
    *,
    split: HeldOutSplit,
    rules: DocumentRules,
    settings: Mapping[str, int],
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    """Held-out rows, their positions, which tokens count, all [B, T], and whether a document begins with a row, [B].

    No positions where documents mean nothing, None of what counts where all tokens do; the last only where the token in
    front of a row is no part of the text.
    """
    rows = corpus.heldout_batches(domain, split=split, **settings)
    counted = corpus.heldout_counted(domain, split=split, **settings)
    positions: Iterable[Tensor | None] = repeat(None)
    begins: Iterable[Tensor | None] = repeat(None)
    if rules.needs_positions:
        positions = corpus.heldout_positions(domain, split=split, **settings)
    if corpus.bos.mode == "row":
        begins = corpus.heldout_begins(domain, split=split, **settings)
    yield from zip(rows, positions, counted, begins, strict=False)


def _num_labels(
    batch_BT: Tensor, positions_BT: Tensor | None, counted_BT: Tensor | None, *, rules: DocumentRules
) -> int:
    counts_BS = torch.ones_like(batch_BT[:, 1:], dtype=torch.bool)
    if positions_BT is not None and not rules.loss_across:
        counts_BS &= positions_BT[:, 1:] != 0
    if counted_BT is not None:
        counts_BS &= counted_BT[:, 1:]
    return int(counts_BS.sum())


def _require_labels(count: int, *, corpus: Corpus, domain: str, split: HeldOutSplit) -> None:
    if not count:
        raise ShearingError(
            "corpus",
            value=f"{corpus.path}: nothing that is read of the {split} text of {domain} counts in the loss",
            allowed="rows with labels that count, as those of answers do",
            mend="read more tokens or longer rows of each domain, or prepare the domain again with loss: all",
        )


def _domain_loss(loss_sum: float, *, num_bytes: int, tokens: int) -> DomainLoss:
    loss = loss_sum / tokens if tokens else math.nan
    bits_per_byte = loss_sum / math.log(2) / num_bytes if num_bytes else None
    return DomainLoss(loss=loss, perplexity=_exp(loss), bits_per_byte=bits_per_byte, tokens=tokens)


def _exp(loss: float) -> float:
    # math.exp raises beyond 709 nats; a model that is that wrong has infinite perplexity.
    return math.exp(loss) if not loss > 700 else math.inf
