"""How often a corpus has each token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import Split

_READ = 1 << 22
_COUNTED: tuple[Split, ...] = ("train", "validation")
"""Not the text that judges: how well it does without the tokens that go is measured on it."""


def token_counts(corpus: Corpus, *, vocab_size: int) -> npt.NDArray[np.int64]:
    """Occurrences of each id in what all domains train on and steer by, int64 [V].

    Args:
        corpus: whose tokens are counted, a few million at a time.
        vocab_size: V, larger than every id.
    """
    counts = np.zeros(vocab_size, np.int64)
    for domain in corpus.domains:
        for split in _COUNTED:
            tokens = corpus.tokens(domain, split=split)
            for start in range(0, len(tokens), _READ):
                ids = tokens.read(start, min(start + _READ, len(tokens)))
                counts += np.bincount(np.asarray(ids, np.int64), minlength=vocab_size)
    return counts
