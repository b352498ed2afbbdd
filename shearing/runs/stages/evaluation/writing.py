"""What source and models of a run write after prompts of test text, and how far they are from the source there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shearing.evaluation.agreement import Read, Rows, agreement
from shearing.evaluation.continuations import NGRAMS, Continuations, continuations, distinct_share, repeated_share
from shearing.evaluation.heldout import heldout_rows
from shearing.files.result_cache import Cached
from shearing.models.stored.paging.shared_out import passes_of_all
from shearing.runs.context import RunContext
from shearing.runs.stages.evaluation.kept import kept
from shearing.runs.stages.evaluation.rows import Row, is_shared_out

_REVISION = 3
"""Raise it when the same settings give other figures."""


def measure_writing(context: RunContext, rows: Sequence[Row], *, results: dict[str, dict[str, Any]]) -> None:
    """Add `generation` to the results of the source and of the run's own models, measured once for each.

    All processes call this. A model that one of them can hold the main one reads and lets write; where the source is
    shared out, so are all.

    Args:
        context: of the run.
        rows: its models; the first one is the source.
        results: by the names of rows; on the main process.
    """
    if not context.recipe.evaluation.generation.prompts:
        return
    processes = context.processes
    places = {row.name: _place(context, row, source=rows[0]) for row in rows if row.of_run}
    found = processes.on_main(lambda: {name: place.read() for name, place in places.items()})
    missing = [row for row in rows if row.of_run and found[row.name] is None]
    if missing and is_shared_out(context, rows[0]):
        found |= _measure(context, missing, source=rows[0], places=places, load=Row.load_shared)
    elif missing:
        found |= processes.on_main(
            lambda: _measure(context, missing, source=rows[0], places=places, load=Row.load_whole)
        )
    for name, each in found.items():
        results[name]["generation"] = each


def _measure(
    context: RunContext,
    rows: Sequence[Row],
    *,
    source: Row,
    places: Mapping[str, Cached],
    load: Callable[[Row], PreTrainedModel],
) -> dict[str, dict[str, Any]]:
    """What is found of models, on the main process, where it is kept as soon as it is there."""
    text, found = _Text(context), {}
    model = load(source)
    with passes_of_all(model, processes=context.processes):
        of_source = text.read_by(model)
    for row in rows:
        if row is not source:
            del model  # before the next one is loaded
            model = load(row)
        with passes_of_all(model, processes=context.processes):
            own = None if row is source else text.read_by(model)
            written = _continued(model, text=text)
        if context.processes.is_main:
            found[row.name] = {**_compared(own, of_source, context=context), **_in_figures(written, text=text)}
            places[row.name].write(found[row.name])
            context.console.print(_in_words(row, found[row.name]), highlight=False)
    return found


def prompts_in_words(context: RunContext) -> list[dict[str, str]]:
    """The prompts whose continuations are shown, one of each domain, as `domain` and `text`."""
    text = _Text(context)
    shown = [text.prompts[index] for index in text.shown]
    return [{"domain": domain, "text": text.words(tokens.tolist())} for domain, tokens in shown]


@dataclass
class _Text:
    """Prompts and rows of the test split, the same for all models."""

    context: RunContext

    @cached_property
    def prompts(self) -> list[tuple[str, Tensor]]:
        """Domain and tokens [S] of each prompt: beginnings of documents, domains in turn.

        S is the setting's, or what the longest documents have where a domain has none that long.
        """
        settings, corpus = self.context.recipe.evaluation.generation, self.context.corpus
        domains = list(corpus.domains)
        beginnings: dict[str, list[Tensor]] = {}
        for index, domain in enumerate(domains):
            wanted = len(range(index, settings.prompts, len(domains)))
            ends = np.asarray(corpus.document_ends(domain, split="test"))
            starts = np.concatenate([[0], ends[:-1]])
            long = np.flatnonzero(ends - starts > settings.prompt_tokens)
            chosen = starts[long[np.linspace(0, len(long) - 1, min(wanted, len(long))).round().astype(int)]]
            tokens = corpus.tokens(domain, split="test")
            beginnings[domain] = [
                torch.from_numpy(np.asarray(tokens.read(start, start + settings.prompt_tokens)).astype(np.int64))
                for start in chosen.tolist()
            ]
        turns = range(max(map(len, beginnings.values()), default=0))
        return [(name, found[turn]) for turn in turns for name, found in beginnings.items() if turn < len(found)]

    @property
    def shown(self) -> list[int]:
        """Indices of the prompts whose continuations are shown: the first one of each domain."""
        first: dict[str, int] = {}
        for index, (domain, _) in enumerate(self.prompts):
            first.setdefault(domain, index)
        return list(first.values())

    @property
    def separator(self) -> int:
        """Token that ends a document."""
        return next(iter(self.context.corpus.manifests.values())).separator_id

    @property
    def front(self) -> list[int]:
        """What a document is read after, as in training: the token of a row, and the separator where that is seen."""
        bos = self.context.corpus.bos
        begin = [] if bos.token is None else [bos.token] * bos.in_row
        return begin if self.context.document_rules.attention_within else [*begin, self.separator]

    @cached_property
    def rows(self) -> Rows:
        """Rows of every domain with their documents, on the device."""
        recipe, corpus = self.context.recipe, self.context.corpus
        rules, device = self.context.document_rules.heeding(corpus.bos), self.context.device
        rows = []
        for domain in corpus.domains:
            settings = {
                "sequence_length": recipe.data.sequence_length,
                "tokens": max(recipe.evaluation.generation.text_tokens, recipe.data.sequence_length),
                "micro_batch_size": recipe.evaluation.micro_batch_size,
            }
            rows += [
                (row_BT.to(device), rules.documents(positions_BT, device=device, counted_BT=counted_BT))
                for row_BT, positions_BT, counted_BT, _ in heldout_rows(
                    corpus, domain, split="test", rules=rules, settings=settings
                )
            ]
        return rows

    def read_by(self, model: PreTrainedModel) -> Read:
        """What a model makes of the rows."""
        within = self.context.document_rules.attention_within
        return Read(model, self.rows, precision=self.context.precision, within_documents=within)

    def words(self, tokens: list[int]) -> str:
        """Tokens as text."""
        text: str = self.context.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def _compared(own: Read | None, source: Read, *, context: RunContext) -> dict[str, Any]:
    """How near a model is to the source; None is the source itself."""
    if own is None or len(own.head.weight) != len(source.head.weight):
        return {"agreement": None, "kl_from_source": None}
    near = agreement(own, source, device=context.device)
    return {"agreement": near.greedy, "kl_from_source": near.kl, "tokens": near.tokens}


def _continued(model: PreTrainedModel, *, text: _Text) -> Continuations | None:
    """What a model writes after the prompts; None where no document is long enough to be one."""
    if not text.prompts:
        return None
    front, recipe = torch.tensor(text.front, dtype=torch.int64), text.context.recipe
    return continuations(
        model,
        torch.stack([torch.cat([front, tokens]) for _, tokens in text.prompts]),
        num_tokens=recipe.evaluation.generation.tokens,
        ends={text.separator, *_ends(model)},
        seed=recipe.seed,
        precision=text.context.precision,
    )


def _in_figures(written: Continuations | None, *, text: _Text) -> dict[str, Any]:
    if written is None:
        return {}
    return {
        name: {
            "repeated": repeated_share(sequences),
            "distinct": {str(n): distinct_share(sequences, n=n) for n in NGRAMS},
            "tokens": sum(map(len, sequences)),
            "shown": [text.words(sequences[index]) for index in text.shown],
        }
        for name, sequences in (("greedy", written.greedy), ("sampled", written.sampled))
    }


def _ends(model: PreTrainedModel) -> list[int]:
    own: Any = model.generation_config
    ends = getattr(own, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _place(context: RunContext, row: Row, *, source: Row) -> Cached:
    recipe = context.recipe
    key = {
        "revision": _REVISION,
        "model": row.fingerprint,
        "source": source.fingerprint,
        "corpus": context.corpus.fingerprint,
        "settings": recipe.evaluation.generation.model_dump(mode="json"),
        "sequence_length": recipe.data.sequence_length,
        "attention": recipe.data.attention,
        "loss_across_documents": recipe.data.loss_across_documents,
        "precision": str(context.precision),
        "seed": recipe.seed,
    }
    return kept(context.directory, kind="generation", key=key)


def _in_words(row: Row, found: dict[str, Any]) -> str:
    parts = []
    if found["agreement"] is not None:
        parts.append(f"the source's likeliest token in {100 * found['agreement']:.0f} % of places")
    if (greedy := found.get("greedy")) and greedy["repeated"] is not None:
        parts.append(f"{100 * greedy['repeated']:.0f} % of 4-grams repeated when writing greedily")
    return f"{row.label}: {', '.join(parts) or 'nothing to compare'}"
