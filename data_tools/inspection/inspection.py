"""What is in a corpus, and what looks wrong with it: `shear data inspect`.

Time is bounded: documents, tokens and bytes are known from the manifests; lengths, duplicates and texts are counted in
full up to the limits below and in a sample of that size beyond them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rich.console import Console

from data_tools.inspection.decoding import open_tokenizer
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import SPLITS, DomainManifest, Split
from shearing.data.corpus.splits import far_from_asked
from shearing.data.mixture.weights import resolve_weights
from shearing.errors import ShearingError, named
from shearing.progress import activity
from shearing.runs.names import COMPONENT_NAMES
from shearing.runs.recipe import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer


MOST_LENGTHS = 1_000_000  # of a domain
MOST_HASHES = 20_000_000  # of the corpus
TOKEN_PIECES, TOKENS_OF_PIECE = 64, 16_384  # of a domain; fewer where there are more than FULL_DOMAINS
DECODED_DOCUMENTS, TOKENS_OF_DOCUMENT = 32, 2_048
FULL_DOMAINS = 32

# What is called a problem.
REPEATED_SHARE = 0.2
REPEATED_RUN = 256
UNREADABLE_SHARE = 0.001

# UTF-8 that was read as Latin-1 or Windows-1252: "é" became "Ã©", a quotation mark "â€œ".
MOJIBAKE = re.compile("[ÃÂ][\u0080-\u00bf]|â€[\u0080-\u00bf\u2018-\u2122\u0152\u0153\u0160\u0161\u017d\u017e]")

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Duplicates:
    """Documents that say what another one says; counted among `sampled` of all documents.

    Attributes:
        within: documents of each domain beyond the first of each text.
        across: documents of each domain whose text another domain has too.
        leaked: validation and test documents of each domain whose text is in a split before theirs, of any domain.
        sampled: share of all texts that was looked at.
    """

    within: Mapping[str, int]
    across: Mapping[str, int]
    leaked: Mapping[str, int]
    sampled: float


@dataclass
class DomainFigures:
    """What is known of a domain.

    Attributes:
        manifest: what it says about itself.
        tokens: of each split.
        share: of the training tokens of the corpus.
        lengths: tokens of documents, separators included; all, or a sample if `lengths_sampled`.
        tokens_read: how many tokens the following two were found in.
        repeated_token: the most frequent token and its share; separators aside.
        longest_run: the token repeated most often in a row, and how often.
        texts: decoded documents, cut off after `TOKENS_OF_DOCUMENT` tokens; none without a tokenizer.
        unreadable: share of characters in them that are replacement characters or mojibake.
        passes: how often the recipe will walk through the training text at its starting weights.
        problems: what looks wrong, in words.
    """

    manifest: DomainManifest
    tokens: Mapping[Split, int]
    share: float
    lengths: Counts
    lengths_sampled: bool
    tokens_read: int
    repeated_token: tuple[int, float]
    longest_run: tuple[int, int]
    texts: list[str]
    unreadable: float
    passes: float | None = None
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Inspection:
    """A corpus and its domains, in its order."""

    path: Path
    domains: Mapping[str, DomainFigures]
    duplicates: Duplicates
    decodable: bool

    @property
    def problems(self) -> list[str]:
        """All problems, each with its domain."""
        return [f"{name}: {problem}" for name, figures in self.domains.items() for problem in figures.problems]


@named({**COMPONENT_NAMES, "corpus": "CORPUS"})
def inspect(path: Path, *, recipe: Recipe | None, longest_document: int, seed: int, console: Console) -> Inspection:
    """Look at a corpus.

    Args:
        path: the corpus.
        recipe: whose use of the corpus is compared with what there is; domains that it does not use are left out.
        longest_document: tokens above which a document is a problem.
        seed: chooses what is read.

    Raises:
        ShearingError: the corpus cannot be opened.
    """
    corpus = Corpus.open(path, domains=recipe.data.domains if recipe else None)
    tokenizer = open_tokenizer(path)
    total = sum(manifest.train.tokens for manifest in corpus.manifests.values())
    planned = _planned_tokens(recipe, corpus=corpus) if recipe else {}
    domains = {}
    with activity("inspect", total=len(corpus.domains) + 1, console=console) as advance:
        for index, (name, manifest) in enumerate(corpus.manifests.items()):
            generator = np.random.default_rng([seed, index])
            figures = _figures(corpus, name, share=manifest.train.tokens / total, tokenizer=tokenizer, chance=generator)
            if name in planned:
                figures.passes = planned[name] / manifest.train.tokens
            domains[name] = figures
            advance(1)
        duplicates = _duplicates(corpus)
        advance(1)
    for name, figures in domains.items():
        figures.problems += _problems(figures, leaked=duplicates.leaked[name], longest_document=longest_document)
    return Inspection(path, domains, duplicates, decodable=tokenizer is not None)


def require_output(path: Path) -> None:
    """Check before the work that a picture can be written.

    Raises:
        ShearingError: another kind of file, or no folder to write it into.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ShearingError("--output", value=str(path), allowed="a .png, .svg or .pdf file", mend="write corpus.png")
    if not path.absolute().parent.is_dir():
        raise ShearingError(
            "--output", value=str(path), allowed="a file in a folder that exists", mend="make the folder"
        )


def _planned_tokens(recipe: Recipe, *, corpus: Corpus) -> dict[str, float]:
    """Tokens of each domain that all training stages read, at the starting weights."""
    tokens = {name: manifest.train.tokens for name, manifest in corpus.manifests.items()}
    weights = resolve_weights(recipe.mixture.initial_weights, tokens=tokens)
    stages, length = recipe.training_stages.values(), recipe.data.sequence_length
    total = sum(
        stage.total_steps(sequence_length=length) * stage.tokens_per_step(sequence_length=length) for stage in stages
    )
    return {name: weight * total for name, weight in weights.items()}


def _figures(
    corpus: Corpus, name: str, *, share: float, tokenizer: Tokenizer | None, chance: np.random.Generator
) -> DomainFigures:
    manifest = corpus.manifests[name]
    lengths, sampled = _lengths(corpus, name, chance=chance)
    scale = min(1.0, FULL_DOMAINS / len(corpus.domains))
    pieces = list(_pieces(corpus, name, most=max(2, round(TOKEN_PIECES * scale)), chance=chance))
    read = np.concatenate(pieces)
    counts = np.bincount(read[~np.isin(read, _marks(manifest))], minlength=1)
    token = int(counts.argmax())
    most = max(2, round(DECODED_DOCUMENTS * scale))
    texts = list(_texts(corpus, name, tokenizer=tokenizer, most=most, chance=chance)) if tokenizer else []
    characters = sum(map(len, texts))
    broken = sum(text.count("\ufffd") + len(MOJIBAKE.findall(text)) for text in texts)
    return DomainFigures(
        manifest=manifest,
        tokens={split: corpus.split_tokens(name, split) for split in SPLITS},
        share=share,
        lengths=lengths,
        lengths_sampled=sampled,
        tokens_read=len(read),
        repeated_token=(token, int(counts[token]) / max(1, len(read))),
        longest_run=max((_longest_run(piece) for piece in pieces), key=lambda run: run[1]),
        texts=texts,
        unreadable=broken / max(1, characters),
    )


def _marks(manifest: DomainManifest) -> list[int]:
    """Tokens that are no text: what ends a document, and what may begin it."""
    return [manifest.separator_id, *([] if manifest.bos_id is None else [manifest.bos_id])]


def _lengths(corpus: Corpus, name: str, *, chance: np.random.Generator) -> tuple[Counts, bool]:
    """Tokens of the documents of all splits; whether they are a sample."""
    found, sampled = [], False
    documents = corpus.manifests[name].documents
    for split in SPLITS:
        ends = corpus.document_ends(name, split=split)
        most = max(1, MOST_LENGTHS * len(ends) // documents)
        if len(ends) <= most:
            found.append(np.diff(ends, prepend=0))
            continue
        sampled = True
        chosen = np.unique(chance.integers(1, len(ends), size=most))
        found.append(ends[chosen] - ends[chosen - 1])
    return np.concatenate(found), sampled


def _pieces(corpus: Corpus, name: str, *, most: int, chance: np.random.Generator) -> Iterator[Counts]:
    """Tokens from random places of the training text, or all of it if it is short."""
    tokens = corpus.tokens(name)
    starts = np.arange(0, len(tokens), TOKENS_OF_PIECE)
    if len(starts) > most:
        starts = np.sort(chance.integers(0, len(tokens) - TOKENS_OF_PIECE, size=most))
    for start in starts.tolist():
        yield tokens.read(start, start + TOKENS_OF_PIECE).astype(np.int64)


def _longest_run(piece: Counts) -> tuple[int, int]:
    """The token repeated most often in a row, and how often."""
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(piece)) + 1, [len(piece)]])
    runs = np.diff(bounds)
    longest = int(runs.argmax())
    return int(piece[bounds[longest]]), int(runs[longest])


def _texts(corpus: Corpus, name: str, *, tokenizer: Tokenizer, most: int, chance: np.random.Generator) -> Iterator[str]:
    """Decoded training documents, different ones where there are enough."""
    ends, tokens = corpus.document_ends(name), corpus.tokens(name)
    count = min(most, len(ends))
    for index in chance.choice(len(ends), size=count, replace=False).tolist():
        start = int(ends[index - 1]) if index else 0
        stop = min(int(ends[index]), start + TOKENS_OF_DOCUMENT)
        ids = tokens.read(start, stop)
        text = tokenizer.decode(ids[~np.isin(ids, _marks(corpus.manifests[name]))].tolist())
        # A character may have been cut in two.
        yield text.rstrip("\ufffd") if stop < ends[index] else text


def _duplicates(corpus: Corpus) -> Duplicates:
    """Count equal documents by their hashes; beyond `MOST_HASHES`, among the texts with the lowest ones."""
    documents = sum(manifest.documents for manifest in corpus.manifests.values())
    sampled = min(1.0, MOST_HASHES / max(1, documents))
    limit = np.uint64(min(2**64 - 1, int(sampled * 2.0**64)))
    hashes, owners, places = [], [], []
    for index, name in enumerate(corpus.domains):
        for place, split in enumerate(SPLITS):
            found = corpus.document_hashes(name, split=split)
            kept = np.array(found) if sampled == 1.0 else found[found < limit]
            hashes.append(kept)
            owners.append(np.full(len(kept), index))
            places.append(np.full(len(kept), place))
    owner, place_of = np.concatenate(owners), np.concatenate(places)
    texts, text = np.unique(np.concatenate(hashes), return_inverse=True)
    size = len(corpus.domains)
    pairs = np.unique(text.astype(np.int64) * size + owner)
    num_domains = np.bincount(pairs // size, minlength=len(texts))
    first_place = np.full(len(texts), len(SPLITS))
    np.minimum.at(first_place, text, place_of)

    def by_domain(chosen: npt.NDArray[np.bool_]) -> Counts:
        return np.bincount(owner[chosen], minlength=size)

    within = by_domain(np.ones(len(owner), dtype=np.bool_)) - np.bincount(pairs % size, minlength=size)
    across, leaked = by_domain(num_domains[text] > 1), by_domain(place_of > first_place[text])
    return Duplicates(
        within=dict(zip(corpus.domains, within.tolist(), strict=True)),
        across=dict(zip(corpus.domains, across.tolist(), strict=True)),
        leaked=dict(zip(corpus.domains, leaked.tolist(), strict=True)),
        sampled=sampled,
    )


def _problems(figures: DomainFigures, *, leaked: int, longest_document: int) -> Iterator[str]:
    manifest = figures.manifest
    if leaked:
        yield (
            f"{leaked:,} validation or test documents are in training text too, or in both: held-out losses will be "
            "too low"
        )
    if figures.passes is not None and figures.passes > 1:
        yield f"smaller than its planned use: the recipe reads it {figures.passes:.1f} times at its starting weights"
    token, share = figures.repeated_token
    if share > REPEATED_SHARE:
        yield f"token {token} is {share:.0%} of {figures.tokens_read:,} tokens read"
    token, run = figures.longest_run
    if run >= REPEATED_RUN:
        yield f"token {token} stands {run:,} times in a row"
    if figures.unreadable > UNREADABLE_SHARE:
        yield f"{figures.unreadable:.1%} of the characters of {len(figures.texts)} documents are of a wrong encoding"
    if (longest := int(figures.lengths.max())) > longest_document:
        yield f"a document of {longest:,} tokens"
    if empty := [name for name, part in manifest.parts.items() if not part.bytes]:
        yield f"no text in {' and '.join(empty)}"
    yield from far_from_asked(manifest)
