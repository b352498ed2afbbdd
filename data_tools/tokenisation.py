"""Text documents in, tokens out: the one path that both the demo and a user's own text take."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import SPLITS, DomainManifest, SourceFile
from shearing.data.corpus.writer import CorpusWriter
from shearing.data.texts.encoding import PlainTokenizer

# Enough for all cores to work on, little enough to show progress and to hold in memory.
CHARACTERS_PER_BATCH = 500_000

_Document = TypeVar("_Document")


def write_domain(
    writer: CorpusWriter,
    name: str,
    *,
    documents: Iterable[str],
    tokenizer: PlainTokenizer,
    sources: Sequence[SourceFile | str],
    inputs: str,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DomainManifest:
    """Tokenise documents on all cores and write them as one domain; blank documents are passed over.

    Args:
        documents: in the order in which they are to lie on disk.
        inputs: identifies text and settings (see `CorpusWriter.is_complete`).
        max_tokens: stop after the document that reaches it; None: take all.
        progress: called now and then with the characters read and the tokens written so far.

    Raises:
        ShearingError: the domain has no text, or too few documents to have some in each split.
    """
    characters = 0
    with writer.domain(name, sources=sources, inputs=inputs) as domain:
        for batch in batches((text for text in documents if text.strip()), characters=len):
            if max_tokens is not None and domain.tokens >= max_tokens:
                break
            for text, encoding in zip(batch, tokenizer.encode(batch), strict=True):
                if max_tokens is None or domain.tokens < max_tokens:
                    domain.add(text, token_ids=encoding.ids)
            characters += sum(map(len, batch))
            if progress is not None:
                progress(characters, domain.tokens)
    assert domain.manifest is not None
    return domain.manifest


def batches(documents: Iterable[_Document], *, characters: Callable[[_Document], int]) -> Iterator[list[_Document]]:
    """Runs of documents of `CHARACTERS_PER_BATCH` together, or one that is longer."""
    batch: list[_Document] = []
    length = 0
    for document in documents:
        batch.append(document)
        length += characters(document)
        if length >= CHARACTERS_PER_BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def progress_columns() -> tuple[ProgressColumn, ...]:
    """What a progress line shows: what is being done, how far it is, time taken and time left."""
    return (
        SpinnerColumn(),
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def domain_table(corpus: Corpus) -> Table:
    """Documents, tokens and bytes per token of each domain, and what was left out; never any of the text.

    Where some tokens do not count in a loss, also which share of them does.
    """
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")  # all of it in 80 columns
    table.add_column("domain", overflow="fold")
    headings = ["documents", "training tokens", "validation", "test", "bytes a token", "duplicates"]
    for heading in headings + ([] if corpus.all_count else ["tokens that count"]):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("left out", overflow="fold")
    for name, manifest in corpus.manifests.items():
        table.add_row(
            name,
            f"{manifest.documents:,}",
            *(f"{corpus.split_tokens(name, split):,}" for split in SPLITS),
            f"{manifest.bytes / max(1, manifest.tokens):.2f}",
            f"{manifest.duplicates:,}",
            *([] if corpus.all_count else [f"{_counted(manifest):.1%}"]),
            ", ".join(f"{count:,} {reason}" for reason, count in manifest.left_out.items()) or "–",
        )
    return table


def next_steps(corpus: Corpus, *, already: bool = False) -> str:
    """That a corpus is whole, and what can be done with it.

    Args:
        already: nothing had to be done for that.
    """
    path = shlex.quote(str(corpus.path))
    whole = "complete already" if already else "complete"
    return f"{path} is {whole}; look into it: shear data inspect {path}; train on it: data.corpus={path}"


def _counted(manifest: DomainManifest) -> float:
    """Share of a domain's tokens that count in a loss."""
    counted = sum(part.tokens if part.counted is None else part.counted for part in manifest.parts.values())
    return counted / max(1, manifest.tokens)
