"""Measure models on the validation text of a corpus, into a loss table that an interrupted measurement continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from shearing.data.corpus.bos import BosChoice, require_bos
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.data.documents import DocumentRules
from shearing.errors import ShearingError
from shearing.evaluation.heldout import heldout_loss
from shearing.evaluation.reference_losses.table import Conditions, LossRow, LossTable
from shearing.models.loading import load_config, load_source, require_weights
from shearing.models.shape import Shape
from shearing.models.tokenizer import begin_tokens, load_tokenizer
from shearing.progress import activity


def measure_losses(
    models: Sequence[str],
    *,
    corpus: Path,
    output: Path,
    domains: Sequence[str] | None,
    sequence_length: int,
    tokens_per_domain: int,
    micro_batch_size: int,
    device: torch.device,
    precision: torch.dtype,
    console: Console,
    bos: BosChoice = "auto",
) -> LossTable:
    """Add each model's held-out losses to the table at `output`; a model that is in it already is not measured again.

    Every model is checked before the first is loaded, and every row is on disk before the next model is.

    Args:
        models: folders or hub names of the supported families.
        corpus: folder of a prepared corpus.
        output: the table; made if missing.
        domains: of the corpus; all if None.
        sequence_length, tokens_per_domain, micro_batch_size: see `heldout_loss`.
        device, precision: of the forward pass.
        console: where progress goes.
        bos: how the corpus is to begin texts, see `require_bos`.

    Raises:
        ShearingError: a model that is none, cannot take the sequence length, begins texts otherwise than the corpus, or
            has another tokenizer: losses per token of two tokenizers cannot be compared; a table of other conditions.
    """
    opened = Corpus.open(corpus, domains=domains, sequence_length=sequence_length)
    if opened.notice:
        console.print(opened.notice, style="yellow", soft_wrap=True, highlight=False)
    fingerprint = next(iter(opened.manifests.values())).tokenizer_fingerprint
    rules = DocumentRules().heeding(opened.bos)
    conditions = Conditions(
        corpus_fingerprint=opened.fingerprint,
        tokenizer_fingerprint=fingerprint,
        sequence_length=sequence_length,
        tokens_per_domain=tokens_per_domain,
        precision=str(precision).removeprefix("torch."),
        split=opened.named_split("validation"),
        attention="documents" if rules.attention_within else "full",
        loss_across_documents=rules.loss_across,
    )
    table = _existing(output, conditions=conditions, origin=str(corpus))
    measured = {row.model for row in table.rows}
    missing = [model for model in dict.fromkeys(models) if model not in measured]
    for model in missing:
        _refuse_unfit(model, corpus=opened, sequence_length=sequence_length, bos=bos)
    for model in models:
        if model in measured:
            console.print(f"{model}: in {output} already", highlight=False, soft_wrap=True)
    for model in missing:
        row = _measure(
            model, opened, conditions=conditions, micro_batch_size=micro_batch_size, device=device, console=console
        )
        table = replace(table, rows=(*table.rows, row))
        table.write(output)
    return table


def _existing(output: Path, *, conditions: Conditions, origin: str) -> LossTable:
    if not output.exists():
        return LossTable(origin=origin, conditions=conditions, rows=())
    table = LossTable.read(output)
    found = {} if table.conditions is None else asdict(table.conditions)
    wanted: dict[str, Any] = asdict(conditions)
    if differing := list(wanted) if table.conditions is None else conditions.differing(table.conditions):
        raise ShearingError(
            str(output),
            value=", ".join(f"{name} {found.get(name)}" for name in differing),
            allowed=", ".join(f"{name} {wanted[name]}" for name in differing)
            + ": only losses measured alike can stand in one table",
            mend="choose another output, or measure as the table was",
        )
    return table


def _refuse_unfit(model: str, *, corpus: Corpus, sequence_length: int, bos: BosChoice) -> None:
    """Raise where measuring `model` on `corpus` would fail or mean nothing; reads config and tokenizer alone."""
    config = load_config(model)
    require_weights(model)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and sequence_length > limit:
        raise ShearingError(
            "--sequence-length",
            value=sequence_length,
            allowed=f"at most {limit}, the positions of {model}",
            mend=f"--sequence-length {limit}, for all models of the table",
        )
    tokenizer = load_tokenizer(model)
    own = tokenizer_fingerprint(tokenizer)
    for name, manifest in corpus.manifests.items():
        if manifest.tokenizer_fingerprint != own or manifest.largest_token >= config.vocab_size:
            raise ShearingError(
                "--model",
                value=f"{model} (tokenizer {own})",
                allowed=f"models with the tokenizer of the corpus, {manifest.tokenizer} "
                f"({manifest.tokenizer_fingerprint}, domain {name}): losses per token of two tokenizers cannot be "
                "compared, and the text is stored as tokens",
                mend="leave the model out, or prepare a corpus of the same text with its tokenizer and another table",
            )
    begin = begin_tokens(tokenizer)
    require_bos(corpus.bos, choice=bos, front=begin.front, named=begin.named, corpus=str(corpus.path))


def _measure(
    model: str,
    corpus: Corpus,
    *,
    conditions: Conditions,
    micro_batch_size: int,
    device: torch.device,
    console: Console,
) -> LossRow:
    length = conditions.sequence_length
    precision: torch.dtype = getattr(torch, conditions.precision)
    total = corpus.heldout_tokens(
        split="validation", sequence_length=length, tokens_per_domain=conditions.tokens_per_domain
    )
    loaded = load_source(model, device=device)
    with activity(f"held-out losses of {model}", total=total, console=console) as advance:
        losses = heldout_loss(
            loaded,
            corpus,
            split="validation",
            tokens_per_domain=conditions.tokens_per_domain,
            sequence_length=length,
            micro_batch_size=micro_batch_size,
            precision=precision,
            progress=advance,
        )
    return LossRow(
        model=model,
        parameters=Shape.of(loaded.config).num_parameters(),
        losses={domain: loss.loss for domain, loss in losses.items()},
        tokens={domain: loss.tokens for domain, loss in losses.items()},
    )
