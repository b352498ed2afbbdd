"""Text to train on: in files (`texts`), tokenised on disk (`corpus`), and which sample comes next (`mixture`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.data.corpus.corpus import Corpus
    from shearing.data.corpus.format import tokenizer_fingerprint
    from shearing.data.corpus.writer import CorpusWriter
    from shearing.data.documents import IGNORED_LABEL, DocumentRules, Documents, Inputs
    from shearing.data.mixture.averages import LossAverages
    from shearing.data.mixture.dynamic import DynamicMixture
    from shearing.data.mixture.prefetcher import Prefetcher
    from shearing.data.mixture.reference import resolve_reference
    from shearing.data.mixture.rules.update import rule_of, update_weights
    from shearing.data.mixture.sampler import Batch, Mixture
    from shearing.data.mixture.weights import resolve_weights
    from shearing.data.recipe import DataRecipe, MixtureRecipe

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "Corpus",
    "CorpusWriter",
    "DataRecipe",
    "DocumentRules",
    "Documents",
    "DynamicMixture",
    "Inputs",
    "LossAverages",
    "Mixture",
    "MixtureRecipe",
    "Prefetcher",
    "resolve_reference",
    "resolve_weights",
    "rule_of",
    "tokenizer_fingerprint",
    "update_weights",
]

__getattr__ = late(
    __name__,
    {
        "Batch": "mixture.sampler",
        "Corpus": "corpus.corpus",
        "CorpusWriter": "corpus.writer",
        "DataRecipe": "recipe",
        "DocumentRules": "documents",
        "Documents": "documents",
        "DynamicMixture": "mixture.dynamic",
        "IGNORED_LABEL": "documents",
        "Inputs": "documents",
        "LossAverages": "mixture.averages",
        "Mixture": "mixture.sampler",
        "MixtureRecipe": "recipe",
        "Prefetcher": "mixture.prefetcher",
        "resolve_reference": "mixture.reference",
        "resolve_weights": "mixture.weights",
        "rule_of": "mixture.rules.update",
        "tokenizer_fingerprint": "corpus.format",
        "update_weights": "mixture.rules.update",
    },
)
