"""Distillation: the text's next tokens, and a teacher's distribution over them.

Shapes: B sequences, S positions, T = S + 1 tokens of a row (S inputs and the last label), M domains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Self

from shearing.data.documents import IGNORED_LABEL, Documents, Inputs
from shearing.data.mixture.origins import Origins
from shearing.models.anatomy import head_of, head_weight
from shearing.objectives.distilled import DistilledLoss, distilled_loss, without_low_entropy
from shearing.objectives.divergences import divergence_of
from shearing.objectives.hidden import HiddenMatching
from shearing.objectives.language_model import LanguageModelLoss, with_balance
from shearing.objectives.objective import Losses, Parts
from shearing.objectives.recipe import DistillRecipe
from shearing.objectives.teacher import OnlineTeacher, Teacher
from shearing.objectives.teacher_cache.cached_teacher import CachedTeacher
from shearing.objectives.teacher_cache.observer import Observer
from shearing.objectives.trust import DomainTrust


class Distillation(LanguageModelLoss):
    """L_t of `distilled_loss`, whose weight a_t depends on step, domain and token; and e_t of `hidden`, if wanted.

    Args:
        model: see `Objective`.
        teacher: what is listened to, no module of this one.
        distill: how.
        domains: names, in the order of `Origins.domains`.
        height: see `Parts`.
        chunk_tokens: tokens whose logits exist at the same time.
        hidden: what compares residual streams, with `distill.hidden`; None: nothing does.
        hidden_steps: see `Parts`.
    """

    measures: tuple[str, ...] = ("teacher_losses", "divergences", "teacher_weights")

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        teacher: Teacher,
        distill: DistillRecipe,
        domains: Sequence[str],
        height: Callable[[int], float],
        chunk_tokens: int,
        hidden: HiddenMatching | None = None,
        hidden_steps: int = 0,
    ) -> None:
        super().__init__(model, chunk_tokens=chunk_tokens)
        device = head_weight(model).device
        self.follows_domains = distill.domains == "auto"
        # Plain attributes: an engine takes charge of modules, parameters and buffers.
        self._teacher = teacher
        self._distill = distill
        self._height = height
        self._weight = distill.weight
        self._trust = DomainTrust(len(domains), margin=distill.margin, device=device)
        self._factors_M = torch.tensor(_factors(distill, domains=domains), device=device)
        self._hidden, self._hidden_steps = hidden, hidden_steps
        self._hidden_weight = 0.0 if distill.hidden is None else distill.hidden.weight
        if hidden is not None:
            self.measures = (*self.measures, "hidden_errors")

    @classmethod
    def of(cls, parts: Parts) -> Self:
        """See `Objective.of`."""
        distill = parts.distill
        assert distill is not None
        teacher = _teacher(parts, distill=distill)
        return cls(
            parts.model,
            teacher=teacher,
            distill=distill,
            domains=parts.domains,
            height=parts.height,
            chunk_tokens=parts.chunk_tokens,
            hidden=_matching(parts, distill=distill, teacher=teacher),
            hidden_steps=parts.hidden_steps,
        )

    def forward(self, tokens_BT: Tensor, documents: Documents | None = None, origins: Origins | None = None) -> Losses:
        """See `Objective.forward`."""
        if not self.training:
            return super().forward(tokens_BT, documents)
        assert origins is not None, "the weight depends on the domain"
        inputs = Inputs(tokens_BT[:, :-1], documents)
        labels_BS = tokens_BT[:, 1:] if documents is None else documents.labels(tokens_BT)
        # Before the student: what the teacher computes on the way is gone when the student's activations come.
        with self._heard(of_teacher=True) as taught:
            targets = self._teacher.targets(inputs, following_BS=tokens_BT[:, 1:], origins=origins)
        with self._heard(of_teacher=False) as own:
            hidden_BSD, balance_B = self.hidden_states(inputs)
        counted_BS = labels_BS != IGNORED_LABEL
        weights_BS = (self._weight * self._factors_M)[origins.domains][:, None].expand(labels_BS.shape)
        if self._distill.skip_low_entropy:
            weights_BS = without_low_entropy(
                weights_BS,
                entropies_BS=targets.entropies().view(labels_BS.shape),
                counted_BS=counted_BS,
                share=self._distill.skip_low_entropy,
            )
        found: DistilledLoss = self.head_pass(
            hidden_BSD,
            compute=lambda hidden_BSD: distilled_loss(
                hidden_BSD,
                head_of(self.model),
                labels_BS,
                targets=targets,
                weights_BS=weights_BS,
                temperature=self._distill.temperature,
                by_label=self._distill.by_label,
                chunk_tokens=self.chunk_tokens,
            ),
        )
        measured_BK = torch.stack([found.teacher_losses, found.divergences, found.weights], 2).sum(1)
        labels_B = counted_BS.sum(1)
        losses = Losses(
            with_balance(found.total, balance_B, labels_B=labels_B), found.losses.sum(1), labels_B, measured_BK
        )
        if self._hidden is None:
            return losses
        errors_B = self._hidden_errors(own, taught=taught, counted_BS=counted_BS)
        apart = (self._factors_M[origins.domains] * errors_B).sum()
        total = losses.total + self._hidden_weight * apart
        return losses._replace(total=total, measured=torch.column_stack([measured_BK, errors_B.detach()]))

    def _heard(self, *, of_teacher: bool) -> AbstractContextManager[list[Tensor]]:
        """The states that are compared, of the forward pass inside; none where nothing is."""
        if self._hidden is None:
            return nullcontext([])
        return self._hidden.of_teacher() if of_teacher else self._hidden.of_student()

    def _hidden_errors(self, own: list[Tensor], *, taught: list[Tensor], counted_BS: Tensor) -> Tensor:
        """[B], sums over the tokens that count; measured to the end, with gradient as long as they weigh something."""
        assert self._hidden is not None
        if not own:  # none of the layers was kept
            return torch.zeros(len(counted_BS), device=counted_BS.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._hidden_weight > 0):
            return (self._hidden.errors(own, teacher=taught) * counted_BS).sum(1)

    def begin_step(self, step: int) -> None:
        """The step's weights."""
        if self._distill.schedule == "learning_rate":
            self._weight = self._distill.weight * self._height(step)
        if self._distill.hidden is not None:
            left = max(0.0, 1.0 - step / self._hidden_steps) if self._hidden_steps else 0.0
            self._hidden_weight = self._distill.hidden.weight * left

    def end_step(self, domains: Tensor) -> None:
        """With domains: auto, how far the teacher is trusted from now on."""
        if self.follows_domains:
            teacher_M = domains[:, 2 + self.measures.index("teacher_losses")]
            self._trust.add(domains[:, 0], teacher_M=teacher_M, labels_M=domains[:, 1])
            self._factors_M = self._trust.factors()

    def memory(self) -> dict[str, Any]:
        """With domains: auto, what trust is made of."""
        return {"trust": self._trust.state()} if self.follows_domains else {}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """See `Objective.recall`."""
        if self.follows_domains:
            self._trust.restore(memory["trust"])
            self._factors_M = self._trust.factors()


def _matching(parts: Parts, *, distill: DistillRecipe, teacher: Teacher) -> HiddenMatching | None:
    """What compares residual streams, if that is wanted: only a model that runs has one."""
    if distill.hidden is None:
        return None
    assert isinstance(teacher, OnlineTeacher)
    assert parts.correspondence is not None
    return HiddenMatching(
        parts.model,
        teacher=teacher.model,
        correspondence=parts.correspondence,
        layers=None if isinstance(distill.hidden.layers, str) else distill.hidden.layers,
    )


def _teacher(parts: Parts, *, distill: DistillRecipe) -> Teacher:
    """What is listened to: a model, or what is kept of it; the model is not loaded where that has to be enough."""
    if parts.cache is None:
        return OnlineTeacher(
            parts.teacher(),
            divergence=divergence_of(distill.kind, top_k=distill.top_k),
            temperature=distill.temperature,
            chunk_tokens=parts.chunk_tokens,
        )
    observer = None
    if distill.listens_online:
        observer = Observer(parts.teacher(), form=parts.cache.conditions.form, chunk_tokens=parts.chunk_tokens)
    return CachedTeacher(parts.cache, domains=parts.domains, observer=observer)


def _factors(distill: DistillRecipe, *, domains: Sequence[str]) -> list[float]:
    """What the weight is multiplied by in each domain, at first."""
    if isinstance(distill.domains, str):
        return [1.0] * len(domains)
    if isinstance(distill.domains, Mapping):
        return [distill.domains.get(name, 0.0) for name in domains]
    return [float(name in distill.domains) for name in domains]
