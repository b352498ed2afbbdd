"""Sparse beside dense on test text: loss by domain, perplexity at a stated length, size of what is not zero."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shearing.data.corpus.bos import BosChoice, require_bos
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.data.documents import Documents, Inputs
from shearing.errors import ShearingError, named
from shearing.evaluation.environment import environment
from shearing.evaluation.heldout import heldout_loss, macro_mean
from shearing.models.loading import load_source
from shearing.models.shape import Shape
from shearing.models.stored.companions import folder_of
from shearing.models.stored.stored_model import WEIGHT_FILES, dtype_of_weights, open_any
from shearing.models.tokenizer import begin_tokens, load_tokenizer
from shearing.pruning.calibration.whole import WholeModel


@dataclass(frozen=True)
class Stored:
    """A model on disk or on the hub: folder or name, revision of a name, whether a family declares it."""

    name: str
    revision: str | None = None
    declared: bool = True


def open_heldout(
    path: Path, *, tokenizer_folder: Path, vocab_size: int, sequence_length: int, bos: BosChoice = "auto"
) -> Corpus:
    """The corpus to evaluate on, checked against the model's tokenizer.

    Raises:
        ShearingError: see `Corpus.open`, `require_bos`.
    """
    tokenizer = load_tokenizer(str(tokenizer_folder))
    with named({"corpus": "evaluate"}):
        corpus = Corpus.open(path, vocab_size=vocab_size, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    begin = begin_tokens(tokenizer)
    require_bos(corpus.bos, choice=bos, front=begin.front, named=begin.named, corpus=str(path))
    try:
        for domain in corpus.domains:
            corpus.heldout_rows(domain, split="test", sequence_length=sequence_length)
    except ShearingError as error:
        # All domains are read, so that none can be left out.
        mend = "set a shorter seqlen, or prepare more text"
        raise ShearingError("seqlen", value=error.value, allowed=error.allowed, mend=mend) from error
    return corpus


def compare(
    models: Mapping[str, Stored],
    *,
    corpus: Corpus,
    tokens_per_domain: int,
    sequence_length: int,
    micro_batch_size: int,
    device: torch.device,
    precision: torch.dtype,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure models one after the other on the same rows.

    Args:
        models: by label; each is loaded whole, in `precision`.
        corpus: whose test text is read.
        tokens_per_domain, sequence_length, micro_batch_size: see `heldout_loss`.
        device: where the models are computed.
        precision: dtype of weights and activations.
        advance: called with the number of tokens just read.

    Returns:
        What `comparison_table` lays out: `settings`, `environment`, and `models` by label, each as in evaluation.json,
        with `nonzero` (parameters that are not zero) and `nonzero_bytes` (their size as the model is stored).
    """
    results = {}
    for label, stored in models.items():
        if stored.declared:
            model, objective = load_source(stored.name, revision=stored.revision, device=device, dtype=precision), None
            shape = Shape.of(model.config)
            sizes = shape.num_parameters(), shape.num_parameters(embeddings=False)
        else:
            whole = _whole(stored, device=device, precision=precision)
            model, objective, sizes = whole.model, _objective_of(whole), _sizes(whole.model)
        losses = heldout_loss(
            model,
            corpus,
            split="test",
            tokens_per_domain=tokens_per_domain,
            sequence_length=sequence_length,
            micro_batch_size=micro_batch_size,
            tokenizer=load_tokenizer(stored.name, revision=stored.revision),
            progress=advance,
            objective=objective,
        )
        nonzero = sum(int(parameter.count_nonzero()) for parameter in model.parameters())
        results[label] = {
            "label": label,
            "group": label,
            "parameters": sizes[0],
            "parameters_without_embeddings": sizes[1],
            "nonzero": nonzero,
            "nonzero_bytes": nonzero * _stored_dtype(stored).itemsize,
            "training_tokens": 0,
            "domains": {domain: loss.to_json() for domain, loss in losses.items()},
            "mean": macro_mean(losses).to_json(),
        }
    settings = {
        "tokens_per_domain": tokens_per_domain,
        "sequence_length": sequence_length,
        "precision": str(precision).removeprefix("torch."),
        "corpus": corpus.fingerprint,
        "split": corpus.named_split("test"),
    }
    return {"settings": settings, "environment": environment(device), "models": results}


def _whole(stored: Stored, *, device: torch.device, precision: torch.dtype) -> WholeModel:
    with tempfile.TemporaryDirectory() as converted:
        source = open_any(stored.name, revision=stored.revision, converted=Path(converted), towers=False)
        return WholeModel(source, device=device, dtype=precision)


def _objective_of(whole: WholeModel) -> Callable[[Tensor, Documents | None], Tensor]:
    """The loss of rows of a model of which no more is known than its layers."""

    def loss(tokens_BT: Tensor, documents: Documents | None) -> Tensor:
        labels_BS = tokens_BT[:, 1:] if documents is None else documents.labels(tokens_BT)
        return whole.losses(whole.states(Inputs(tokens_BT[:, :-1])), labels_BS).sum(dtype=torch.float64)

    return loss


def _sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters of a model, and those of them that are in neither the embedding nor the head; shared ones once."""
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    of_ends = {id(parameter): parameter.numel() for module in ends for parameter in module.parameters()}
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - sum(of_ends.values())


def _stored_dtype(stored: Stored) -> torch.dtype:
    """That of most of a model's weights on disk, in whatever precision it is computed."""
    from transformers import AutoConfig

    folder = folder_of(stored.name, revision=stored.revision, also=WEIGHT_FILES)
    return dtype_of_weights(str(folder), config=AutoConfig.from_pretrained(folder))
