"""What the checks and the stages of a run have in common: the recipe, and all that is resolved from it, once.

Nothing is resolved before it is asked for, so a stage opens only what it needs; what has been is kept for the stages
that follow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from shearing.data.corpus.bos import require_bos
from shearing.data.corpus.corpus import Corpus, whole_rows
from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.data.corpus.overlap import trained_texts
from shearing.data.documents import DocumentRules, Inputs
from shearing.data.mixture.sampler import Mixture
from shearing.data.mixture.weights import resolve_weights
from shearing.errors import ShearingError, named
from shearing.models.loading import load_config
from shearing.models.shape import Shape
from shearing.models.stored.stored_model import stored_fingerprint
from shearing.models.tokenizer import begin_tokens, open_tokenizer
from shearing.objectives.teacher_cache.cache import TeacherCache
from shearing.processes.processes import Processes
from shearing.pruning.calibration.text import first_samples
from shearing.pruning.rotation.tied import config_as_cut
from shearing.runs.names import COMPONENT_NAMES, DISTILL_NAMES, TEACHER_NAMES
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory
from shearing.training.device import keep_freed_memory, resolve_device, resolve_precision

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, eq=False)
class RunContext:
    """A recipe, where it runs, and what is resolved from it.

    Every property that can fail raises `ShearingError` where it is first asked for, and again where it is asked for
    again.

    Attributes:
        recipe: what to do.
        console: where progress goes; stdout if not given.
        processes: those that share the work, each with a context of its own; this one alone if not given.
    """

    recipe: Recipe
    console: Console = field(default_factory=Console)
    processes: Processes = field(default_factory=Processes)

    @cached_property
    def directory(self) -> RunDirectory:
        """The run's folder."""
        return RunDirectory(self.recipe.run_dir)

    @cached_property
    @named(COMPONENT_NAMES)
    def device(self) -> torch.device:
        """Where this process computes.

        Raises:
            ShearingError: see `resolve_device`.
        """
        device = resolve_device(self.recipe.training.device)
        keep_freed_memory(device, processes=self.processes.size)
        return device

    @cached_property
    def precision(self) -> torch.dtype:
        """Dtype of matrix products."""
        return resolve_precision(self.recipe.training, device=self.device)

    @cached_property
    @named(COMPONENT_NAMES)
    def config(self) -> PretrainedConfig:
        """The source model's; whoever changes one changes a copy.

        Raises:
            ShearingError: see `load_config`.
        """
        return load_config(self.recipe.model.source, revision=self.recipe.model.revision)

    @cached_property
    def config_as_cut(self) -> PretrainedConfig:
        """That of the model whose units go: the source's, but for a head of its own if a rotation unties it.

        Raises:
            ShearingError: see `load_config`.
        """
        return config_as_cut(self.config, prune=self.recipe.prune)

    @cached_property
    def teacher_config(self) -> PretrainedConfig | None:
        """That of the model that is listened to; None: there is none.

        Raises:
            ShearingError: see `load_config`.
        """
        teacher = self.recipe.teacher
        if teacher is None or teacher == self.recipe.model:
            return None if teacher is None else self.config
        with named(TEACHER_NAMES):
            return load_config(teacher.source, revision=teacher.revision)

    @property
    def teacher_shape(self) -> Shape | None:
        """Its sizes."""
        return None if self.teacher_config is None else Shape.of(self.teacher_config)

    @cached_property
    @named(DISTILL_NAMES)
    def teacher_cache(self) -> TeacherCache | None:
        """What is kept of the teacher's distributions, checked against what the run reads; None: nothing.

        Raises:
            ShearingError: it is of another corpus, teacher, length or document rule, of another form, or damaged.
        """
        distill, teacher, data = self.recipe.distill, self.recipe.teacher, self.recipe.data
        if distill is None or distill.cache is None or teacher is None:
            return None
        cache = TeacherCache.open(distill.cache)
        with named(TEACHER_NAMES):
            fingerprint = stored_fingerprint(teacher.source, revision=teacher.revision)
        cache.require_serves(kind=distill.kind, top_k=distill.top_k, temperature=distill.temperature)
        cache.require_made_for(
            corpus=self.corpus,
            teacher=fingerprint,
            called=teacher.source,
            vocab_size=self.config.vocab_size,
            sequence_length=data.sequence_length,
            attention=data.attention,
            precision=None if distill.precision == "auto" else distill.precision,
        )
        return cache

    @cached_property
    @named({"source": "model.source"})
    def tokenizer(self) -> Any:
        """The source model's.

        Raises:
            ShearingError: see `open_tokenizer`.
        """
        opened = open_tokenizer(self.recipe.model.source, revision=self.recipe.model.revision)
        if opened.notice and self.processes.is_main:
            self.console.print(opened.notice, style="yellow", soft_wrap=True, highlight=False, markup=False)
        return opened.full

    @cached_property
    @named(COMPONENT_NAMES)
    def corpus(self) -> Corpus:
        """The recipe's domains, checked against the source model and its tokenizer.

        Raises:
            ShearingError: see `Corpus.open`, `require_bos`.
        """
        data = self.recipe.data
        corpus = Corpus.open(
            data.corpus,
            domains=data.domains,
            vocab_size=self.config.vocab_size,
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            sequence_length=data.sequence_length,
        )
        self._require_bos(corpus)
        if corpus.notice and self.processes.is_main:
            self.console.print(corpus.notice, style="yellow", soft_wrap=True, highlight=False)
        return corpus

    @cached_property
    @named({**COMPONENT_NAMES, "corpus": "evaluation.outside", "domains": "evaluation.outside"})
    def outside(self) -> Corpus | None:
        """Text of no training domain, checked against the source model, its tokenizer and what is trained on.

        Raises:
            ShearingError: see `Corpus.open`; the run trains on some of it.
        """
        path = self.recipe.evaluation.outside
        if path is None:
            return None
        corpus = Corpus.open(
            path, vocab_size=self.config.vocab_size, tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer)
        )
        self._require_bos(corpus)
        for domain in corpus.domains:
            corpus.heldout_rows(domain, split="test", sequence_length=self.recipe.data.sequence_length)
        if shared := next(trained_texts(corpus, trained=self.corpus), None):
            raise ShearingError(
                "evaluation.outside",
                value=f"{path}: domain {shared.outside}",
                allowed=f"text that is not trained on: {shared.documents:,} training documents of domain "
                f"{shared.trained} are in it too",
                mend=f"leave {shared.trained} out of data.domains, or prepare {shared.outside} from other text",
            )
        return corpus

    def _require_bos(self, corpus: Corpus) -> None:
        begin = begin_tokens(self.tokenizer)
        require_bos(
            corpus.bos, choice=self.recipe.data.bos, front=begin.front, named=begin.named, corpus=str(corpus.path)
        )

    @property
    def document_rules(self) -> DocumentRules:
        """What the end of a document means; what reads a corpus heeds how its texts begin, too."""
        data = self.recipe.data
        return DocumentRules(attention_within=data.attention == "documents", loss_across=data.loss_across_documents)

    @cached_property
    @named(COMPONENT_NAMES)
    def initial_weights(self) -> dict[str, float]:
        """The starting weight of each domain, summing to 1, in the order of the corpus.

        Raises:
            ShearingError: see `resolve_weights`.
        """
        tokens = {domain: manifest.train.tokens for domain, manifest in self.corpus.manifests.items()}
        return resolve_weights(self.recipe.mixture.initial_weights, tokens=tokens)

    def initial_mixture(self) -> Mixture:
        """The mixture from its first sample on, at the starting weights."""
        return Mixture(
            self.corpus,
            seed=self.recipe.seed,
            sequence_length=self.recipe.data.sequence_length,
            weights=self.initial_weights,
            documents=self.document_rules,
        )

    def calibration_batches(self) -> list[Inputs]:
        """Inputs [B, S] of the first training samples: `prune.calibration_tokens` in whole sequences, at least one."""
        mixture, prune = self.initial_mixture(), self.recipe.pruning.prune
        samples = whole_rows(prune.calibration_tokens, sequence_length=mixture.sequence_length)
        return list(
            first_samples(mixture, samples=samples, micro_batch_size=prune.micro_batch_size, device=self.device)
        )
