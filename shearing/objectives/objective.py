"""What an objective is: a model whose forward pass is what a step minimises. And any of them by its name.

Shapes: B sequences, T = S + 1 tokens of a row (S inputs and the last label).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

from shearing.data.documents import Documents
from shearing.objectives.registry import OBJECTIVES

PARAMETER_PREFIX = "model."
"""What precedes a model's own parameter names in its objective, and so in an engine."""


class Losses(NamedTuple):
    """Sums of the loss of B rows, in nats.

    Attributes:
        total: over all tokens; scalar, with gradient.
        rows: [B], over the tokens of each row; without gradient.
        labels: int64 [B], how many tokens of each row count.
    """

    total: Tensor
    rows: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a stage has to make an objective of.

    Attributes:
        model: to be trained, masked in place while masks are learned.
        chunk_tokens: tokens whose logits exist at the same time.
        source: loads one more copy of the source model, as it was before anything was masked, refitted or cut; whole,
            on the stage's device, attending as `model` does.
    """

    model: PreTrainedModel
    chunk_tokens: int
    source: Callable[[], PreTrainedModel]


class Objective(nn.Module, ABC):
    """What an engine prepares and the loop calls: tokens in, `Losses` out.

    An engine takes charge of what is among its parameters and buffers: it places, shards, trains and saves them. What
    an objective only listens to (a teacher) must not be among them, so it is held in something that is no module:
    `self._teacher = (teacher,)`. Its forward pass then runs inside this one's, whole on every process.

    In eval mode the total is the language model's loss, whatever training minimises, and rows always are: domain
    weights and held-out losses go by them.

    Args:
        model: Hugging Face model, or one masked in place; its parameters appear under `model.`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @classmethod
    @abstractmethod
    def of(cls, parts: Parts) -> Self:
        """The objective of a stage."""

    @abstractmethod
    def forward(self, tokens_BT: Tensor, documents: Documents | None = None) -> Losses:
        """Sums of the loss over the B * (T - 1) tokens, or those that count.

        Args:
            tokens_BT: int64, S inputs and the last label: T = S + 1.
            documents: of these rows; None where documents mean nothing.
        """


def objective_of(name: str, *, parts: Parts) -> Objective:
    """The objective of a name.

    Args:
        name: one of `OBJECTIVES`.
        parts: what the stage has.
    """
    objective: Objective = resolve_name(OBJECTIVES[name]).of(parts)
    return objective
