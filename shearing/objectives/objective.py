"""What an objective is: a model whose forward pass is what a step minimises. And any of them by its name.

Shapes: B sequences, T = S + 1 tokens of a row (S inputs and the last label), M domains, K measures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

from shearing.data.documents import Documents
from shearing.data.mixture.origins import Origins
from shearing.models.correspondence import Correspondence
from shearing.objectives.recipe import DistillRecipe
from shearing.objectives.registry import OBJECTIVES
from shearing.objectives.teacher_cache.cache import TeacherCache

Result = TypeVar("Result")

PARAMETER_PREFIX = "model."
"""What precedes a model's own parameter names in its objective, and so in an engine."""


class Losses(NamedTuple):
    """Sums of the loss of B rows, in nats.

    Attributes:
        total: over all tokens; scalar, with gradient.
        rows: [B], over the tokens of each row; without gradient.
        labels: int64 [B], how many tokens of each row count.
        measured: [B, K], sums over the tokens of each row of what `Objective.measures` names; without gradient.
    """

    total: Tensor
    rows: Tensor
    labels: Tensor
    measured: Tensor


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a stage has to make an objective of.

    Attributes:
        model: to be trained, masked in place while masks are learned.
        chunk_tokens: tokens whose logits exist at the same time.
        domains: names, in the order of `Origins.domains`.
        distill: how a teacher is listened to; None: not at all.
        cache: what is kept of the teacher's distributions, None: nothing.
        teacher: loads the model that is listened to, whole, as it is stored and not as it is trained, on the stage's
            device, attending as `model` does.
        height: of the learning rate of the step that follows so many done ones: 1 at its peak, 0 at the end of a decay.
        correspondence: of `model` to the source model; None: not known.
        hidden_steps: from the stage's start until streams are no longer matched (`HiddenRecipe.decay`).
    """

    model: PreTrainedModel
    chunk_tokens: int
    domains: Sequence[str]
    distill: DistillRecipe | None
    cache: TeacherCache | None = None
    teacher: Callable[[], PreTrainedModel]
    height: Callable[[int], float]
    correspondence: Correspondence | None = None
    hidden_steps: int = 0


class HeadPass(nn.Module):
    """What is computed with the head's weight, as a forward pass.

    An engine that gathers weights for the forward pass of the module that has them can so gather the head's for this
    one alone.
    """

    def forward(self, hidden_BSD: Tensor, *, compute: Callable[[Tensor], Result]) -> Result:
        """What is made of hidden states after the final norm [B, S, D].

        Args:
            hidden_BSD: to be passed on.
            compute: makes it, and reads the head's weight in doing so.
        """
        return compute(hidden_BSD)


class Objective(nn.Module, ABC):
    """What an engine prepares and the loop calls: tokens in, `Losses` out.

    An engine takes charge of what is among its parameters and buffers: it places, shards, trains and saves them. What
    an objective only listens to (a teacher) must not be among them, so it is held in something that is no module
    (`teacher.OnlineTeacher`). Its forward pass then runs inside this one's, whole on every process.

    In eval mode the total is the language model's loss, whatever training minimises, and rows always are: domain
    weights and held-out losses go by them.

    What it learns of the domains while training goes on, and no optimiser does, is in every checkpoint.

    Attributes:
        measures: what is measured of every row beside its loss, K names.
        follows_domains: whether `end_step` wants the domains' sums of every step.
        head_pass: runs whatever in the forward pass needs the head's weight.

    Args:
        model: Hugging Face model, or one masked in place; its parameters appear under `model.`.
    """

    measures: tuple[str, ...] = ()
    follows_domains: bool = False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.head_pass = HeadPass()

    @classmethod
    @abstractmethod
    def of(cls, parts: Parts) -> Self:
        """The objective of a stage."""

    @abstractmethod
    def forward(self, tokens_BT: Tensor, documents: Documents | None = None, origins: Origins | None = None) -> Losses:
        """Sums of the loss over the B * (T - 1) tokens, or those that count.

        Args:
            tokens_BT: int64, S inputs and the last label: T = S + 1.
            documents: of these rows; None where documents mean nothing.
            origins: of these rows; None in eval mode.
        """

    def begin_step(self, step: int) -> None:
        """A step begins, after so many done ones."""

    def end_step(self, domains: Tensor) -> None:
        """A step was done; nothing may wait for the device.

        Args:
            domains: fp64 [M, 2 + K] over all processes: of each domain sums of losses, labels, and what was measured.
        """

    def memory(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON-able, the same on all processes."""
        return {}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Continue where `memory` was taken, bit for bit."""


def objective_of(name: str, *, parts: Parts) -> Objective:
    """The objective of a name.

    Args:
        name: one of `OBJECTIVES`.
        parts: what the stage has.
    """
    objective: Objective = resolve_name(OBJECTIVES[name]).of(parts)
    return objective
