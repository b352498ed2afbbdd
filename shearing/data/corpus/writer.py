"""Writes a corpus domain by domain, from documents that this process has."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from typing_extensions import Self

from shearing.data.corpus.bos import Bos
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.domain_folder import (
    DomainSettings,
    decide_places,
    earlier_texts,
    is_complete,
    make_corpus_folder,
    require_divided_as_before,
    write_domain_folder,
    write_index,
)
from shearing.data.corpus.format import FORMAT, DomainManifest, SourceFile, require_domain_name
from shearing.data.corpus.shards import Shard, ShardWriter
from shearing.data.corpus.splits import Documents, SplitSize, SplitSizes
from shearing.errors import ShearingError
from shearing.files.durable import flush_folder


class CorpusWriter:
    """Writes a corpus domain by domain from documents that this process has; `finish` makes the corpus valid.

    Each domain appears whole or not at all. What it holds out respects the domains written before it.

    Args:
        path: folder of the corpus, made if missing; may hold domains written earlier.
        vocab_size: largest token id + 1; chooses uint16 or uint32.
        separator_id: token put after every document.
        tokenizer: name of the tokenizer, for people.
        tokenizer_fingerprint: of the same tokenizer, for machines.
        tokenizer_json: content of its tokenizer.json, so that the corpus can be decoded.
        validation_fraction, test_fraction: shares of the tokens held out, above 0 and below 1 together.
        split_seed: another one holds out other documents.
        bos: how texts begin; with `document` its token is put in front of every document here.

    Raises:
        ShearingError: the folder cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocab_size: int,
        separator_id: int,
        tokenizer: str,
        tokenizer_fingerprint: str,
        tokenizer_json: str | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.05,
        split_seed: int = 0,
        bos: Bos | None = None,
    ) -> None:
        try:
            validation, test = (SplitSize.parse(f"{100 * each:.6f}%") for each in (validation_fraction, test_fraction))
            sizes = SplitSizes(validation, test)
        except ValueError:
            raise ShearingError(
                "validation_fraction, test_fraction",
                value=[validation_fraction, test_fraction],
                allowed="above 0 each, and below 1 together",
                mend="try 0.05",
            ) from None
        self.path = Path(path)
        self.tokenizer_json = tokenizer_json
        self.settings = DomainSettings(
            vocab_size=vocab_size,
            separator_id=separator_id,
            tokenizer=tokenizer,
            tokenizer_fingerprint=tokenizer_fingerprint,
            split_seed=split_seed,
            sizes=sizes,
            versions={"numpy": np.__version__},
            bos=bos or Bos(),
        )
        make_corpus_folder(self.path)
        try:
            for left in self.path.glob(".partial-*"):
                shutil.rmtree(left)
        except OSError as error:
            raise ShearingError(
                str(self.path), value=str(error), allowed="a folder that can be written", mend="choose another output"
            ) from error

    def is_complete(self, domain: str, *, inputs: str) -> bool:
        """Whether the domain was already written from the same `inputs` with the same tokenizer and split.

        Raises:
            ShearingError: it was written from something else; runs may depend on it, so it is not replaced.
        """
        return is_complete(self.path / domain, inputs=self._inputs(inputs))

    def domain(self, name: str, *, sources: Sequence[SourceFile | str], inputs: str) -> DomainWriter:
        """A writer of one domain, to be used as a context manager; leaving it without an error publishes the domain.

        Args:
            sources: where the text came from: files, or descriptions for people.
            inputs: identifies text and settings, for `is_complete`.

        Raises:
            ShearingError: the name cannot be a folder's, or is taken.
        """
        require_domain_name(name)
        files = [SourceFile(source) if isinstance(source, str) else source for source in sources]
        return DomainWriter(self, name=name, sources=files, inputs=self._inputs(inputs))

    def finish(self) -> Corpus:
        """Write `corpus.json` over all domains in the folder and open the corpus.

        Raises:
            ShearingError: there is no domain, or one was written with another tokenizer.
        """
        return write_index(
            self.path,
            tokenizer_fingerprint=self.settings.tokenizer_fingerprint,
            tokenizer_json=self.tokenizer_json,
        )

    def _inputs(self, inputs: str) -> str:
        settings = self.settings
        parts = [inputs, settings.tokenizer_fingerprint, settings.separator_id, settings.sizes.to_json()]
        return hashlib.sha256(
            json.dumps([*parts, settings.split_seed, FORMAT, *settings.bos.identity()]).encode()
        ).hexdigest()[:32]


class DomainWriter:
    """Takes the documents of a domain one by one; which are held out is decided over all of them, at the end."""

    def __init__(self, corpus: CorpusWriter, *, name: str, sources: Sequence[SourceFile], inputs: str) -> None:
        self._corpus = corpus
        self._name = name
        self._sources = tuple(sources)
        self._inputs = inputs
        self._final = corpus.path / name
        self._folder = corpus.path / f".partial-{name}"
        self._shard: ShardWriter | None = None
        self.manifest: DomainManifest | None = None

    def __enter__(self) -> Self:
        if self._final.exists():
            raise ShearingError(
                str(self._final), value="exists", allowed="a new domain", mend="choose another output, or delete it"
            )
        (self._folder / "shard").mkdir(parents=True)
        settings = self._corpus.settings
        self._shard = ShardWriter(
            self._folder / "shard",
            vocab_size=settings.vocab_size,
            separator_id=settings.separator_id,
            begin_id=settings.begin_id,
        )
        return self

    @property
    def tokens(self) -> int:
        """Tokens written so far, separators included."""
        return self._shard.tokens if self._shard else 0

    def add(self, text: str, *, token_ids: Sequence[int]) -> None:
        """Append one document; the separator, and the token in front, are added here.

        Raises:
            ShearingError: a token id is negative or not below the vocabulary size.
        """
        assert self._shard is not None
        self._shard.add([text.encode(errors="surrogatepass")], token_ids=[token_ids])

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        assert self._shard is not None
        try:
            if error_type is None:
                self._publish(self._shard.close(sources=self._sources, left_out={}))
            else:
                self._shard.abandon()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _publish(self, shard: Shard) -> None:
        settings = self._corpus.settings
        path, domains = self._corpus.path, {self._name: Documents.of_shards([shard])}
        places = decide_places(domains, sizes=settings.sizes, seed=settings.split_seed, earlier=earlier_texts(path))
        require_divided_as_before(path, domains=domains, places=places, inputs={self._name: self._inputs})
        folder = self._folder / "domain"
        folder.mkdir()
        self.manifest = write_domain_folder(
            folder,
            name=self._name,
            shards=[shard],
            places=places[self._name],
            settings=settings,
            inputs=self._inputs,
        )
        folder.rename(self._final)
        flush_folder(self._corpus.path)
