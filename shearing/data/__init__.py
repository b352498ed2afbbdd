"""Which text comes next: tokenised domains on disk, the sampler over them, and the rules that move their weights."""

from __future__ import annotations

from shearing.mixture.averages import LossAverages
from shearing.mixture.corpus import Corpus, tokenizer_fingerprint
from shearing.mixture.reference import resolve_reference
from shearing.mixture.rules import rule_of, update_weights
from shearing.mixture.sampler import Batch, Mixture, Prefetcher
from shearing.mixture.weights import resolve_weights
from shearing.mixture.writer import CorpusWriter

__all__ = [
    "Batch",
    "Corpus",
    "CorpusWriter",
    "LossAverages",
    "Mixture",
    "Prefetcher",
    "resolve_reference",
    "resolve_weights",
    "rule_of",
    "tokenizer_fingerprint",
    "update_weights",
]
