"""A model's folder cut to the tokens of a corpus, and what that does to its text: compared before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from shearing.data.corpus.corpus import Corpus
from shearing.data.token_usage import token_counts
from shearing.errors import ShearingError
from shearing.files.durable import read_json, write_json
from shearing.files.tensors import read_header
from shearing.models.anatomy import anatomy_of, head_weight
from shearing.models.stored.cut_vocabulary import KEPT, cut_vocabulary
from shearing.models.stored.paging.on_demand import on_demand, weights_here
from shearing.models.stored.stored_model import open_source

TOKENS = 65_536
"""Test tokens of each domain whose text is tokenised before and after."""

_LOGITS_OF = 64
_LARGEST_DIFFERENCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class CutVocabulary:
    """A vocabulary that was cut.

    Attributes:
        rows, of: tokens now and before.
        documents, unchanged: test documents compared, and those that have the same tokens.
        tokens, tokens_now: of these documents, before and now.
        difference: of the logits of kept tokens, relative.
    """

    rows: int
    of: int
    documents: int
    unchanged: int
    tokens: int
    tokens_now: int
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.rows:,} of {self.of:,} tokens kept; {self.unchanged:,} of {self.documents:,} test documents have "
            f"the same tokens, all together {self.tokens_now / max(self.tokens, 1) - 1:+.2%}"
        )


def cut_to_corpus(
    folder: Path, *, corpus: Corpus, size: int | str, whole: PreTrainedModel, masks: Path | None
) -> CutVocabulary:
    """Cut a model's folder, in place, to the tokens that a corpus uses most, and compare it with the whole model.

    Text of the corpus's test split is tokenised by both: where all its tokens are kept, they have to be the same, and
    text must come back from the others too. Logits of kept tokens have to be those of the whole model.

    Args:
        folder: see `cut_vocabulary`.
        corpus: tokenised as the model is.
        size: rows, or `auto`.
        whole: the folder's model before, in fp32 on the CPU, or with weights that come on demand.
        masks: of a sparse model, whose manifest is to be written afterwards: it names sizes of files.

    Raises:
        ShearingError: as `cut_vocabulary`, or something is not the same.
    """
    _require_unmasked(masks, whole=whole)
    path, rows = folder / "tokenizer.json", int(whole.config.vocab_size)
    before = Tokenizer.from_file(str(path))
    kept = cut_vocabulary(folder, counts=token_counts(corpus, vocab_size=rows), size=size)
    after = Tokenizer.from_file(str(path))
    new = {old: index for index, old in enumerate(kept)}
    documents = unchanged = tokens = tokens_now = 0
    first: list[int] = []
    for text in _texts(corpus, tokenizer=before):
        ids, now = (each.encode(text, add_special_tokens=False).ids for each in (before, after))
        same = [new.get(old) for old in ids]
        if None in same:
            alike = before.decode(ids, skip_special_tokens=False) == after.decode(now, skip_special_tokens=False)
        else:
            alike, unchanged = now == same, unchanged + 1
        if not alike:
            raise _differs(f"other tokens or text for {text[:40]!r}")
        documents, tokens, tokens_now = documents + 1, tokens + len(ids), tokens_now + len(now)
        first += now[: _LOGITS_OF - len(first)]
    record = CutVocabulary(
        rows=len(kept),
        of=rows,
        documents=documents,
        unchanged=unchanged,
        tokens=tokens,
        tokens_now=tokens_now,
        difference=_difference(folder, whole=whole, ids=first, kept=kept),
    )
    compared = {"documents": documents, "unchanged": unchanged, "tokens": tokens, "tokens_now": tokens_now}
    write_json(folder / KEPT, {**read_json(folder / KEPT), "test_text": compared})
    return record


def _require_unmasked(masks: Path | None, *, whole: PreTrainedModel) -> None:
    """No mask of a sparse model is of rows that are cut."""
    names = {parameter.name for parameter in anatomy_of(whole).embeddings}
    if masks is not None and (masked := names & read_header(masks)[0].keys()):
        raise ShearingError(
            "vocab_size",
            value=f"masks of {', '.join(sorted(masked))}",
            allowed="a sparse model whose masks are of its layers alone",
            mend="leave it out: the model keeps its vocabulary",
        )


def _texts(corpus: Corpus, *, tokenizer: Tokenizer) -> Iterator[str]:
    """Text of the first test documents of each domain."""
    for domain in corpus.domains:
        tokens, start = corpus.tokens(domain, split="test"), 0
        for end in corpus.document_ends(domain, split="test").tolist():
            ids = np.asarray(tokens.read(start, end)).tolist()
            yield tokenizer.decode(ids[:-1], skip_special_tokens=False)  # without the separator
            start = end
            if start >= TOKENS:
                break


@torch.no_grad()
def _difference(folder: Path, *, whole: PreTrainedModel, ids: list[int], kept: list[int]) -> float:
    """How far logits of kept tokens are from those of the whole model, relatively."""
    files = open_source(str(folder), revision=None, converted=folder.with_name(f"{folder.name}.converted"))
    cut, old = on_demand(files, device=torch.device("cpu")), torch.tensor(kept)
    found = _logits(cut, torch.tensor([ids]))
    expected = _logits(whole.eval(), old[ids][None])[..., old]
    apart = float((found - expected).norm() / expected.norm())
    if not apart <= _LARGEST_DIFFERENCE:
        raise _differs(f"logits of kept tokens differ by {apart:.3g}")
    return apart


def _logits(model: PreTrainedModel, tokens_BS: Tensor) -> Tensor:
    with weights_here(head_weight(model)):
        logits_BSV: Tensor = model(tokens_BS, use_cache=False).logits
        return logits_BSV.double()


def _differs(value: str) -> ShearingError:
    return ShearingError(
        "vocab_size",
        value=value,
        allowed="the same logits of kept tokens, and the same tokens of text that uses no others",
        mend="leave it out, and please report it: the tokenizer does something that cutting it does not know",
    )
