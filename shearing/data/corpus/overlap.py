"""Texts that two corpora share, by the hashes of their documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import SPLITS

HASHES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Overlap:
    """`documents` training documents of the domain `trained` have a text that the domain `outside` has."""

    outside: str
    trained: str
    documents: int


def trained_texts(outside: Corpus, *, trained: Corpus) -> Iterator[Overlap]:
    """What of one corpus, in whatever split, is in the training split of another.

    Tokens that were adopted are known by another hash than texts: between them and prepared text nothing is found.

    Args:
        outside: held in memory by its hashes, 8 bytes a document.
        trained: read once for each domain of `outside`, whatever its size.
    """
    for name in outside.domains:
        texts = np.unique(np.concatenate([outside.document_hashes(name, split=split) for split in SPLITS]))
        for domain in trained.domains:
            hashes = trained.document_hashes(domain)
            count = sum(
                int(np.isin(hashes[start : start + HASHES_AT_ONCE], texts).sum())
                for start in range(0, len(hashes), HASHES_AT_ONCE)
            )
            if count:
                yield Overlap(outside=name, trained=domain, documents=count)
