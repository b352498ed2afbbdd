"""What an objective listens to: targets for the tokens of a micro-batch, chunk by chunk.

Where they come from is the teacher's business: `OnlineTeacher` is a model that reads the same tokens. One that has kept
something of its distributions (`teacher_cache`) needs neither hidden states nor a head; it says the same three things
of each token.

Shapes: B sequences, S positions, N = B * S tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shearing.data.documents import Inputs
from shearing.data.mixture.origins import Origins
from shearing.models.anatomy import Head, backbone, head_of
from shearing.objectives.chunked import Scratch, chunked_logits, sum_dtype
from shearing.objectives.divergences import Divergence, inner


def teacher_precision(precision: Literal["auto", "fp32", "bf16"], *, products: torch.dtype) -> torch.dtype:
    """Dtype of an online teacher's weights and products.

    Args:
        precision: which; auto: as the student's products.
        products: dtype of the student's.
    """
    if precision == "auto":
        return products
    return torch.bfloat16 if precision == "bf16" else torch.float32


class SparseGradient(Protocol):
    """A divergence's gradient that is a multiple of the student's probabilities q but at few tokens of each position.

    It is never made: what is wanted of it can be done in place of q.
    """

    def mix_into(self, q_CV: Tensor, weights_C: Tensor) -> None:
        """Put (1 - a) q + a g in place of q.

        Args:
            q_CV: the student's probabilities.
            weights_C: a.
        """
        ...


class Comparison(NamedTuple):
    """A chunk's distributions beside the teacher's.

    Attributes:
        divergences: [C], in nats, at the temperature of both.
        teacher_losses: [C], of the teacher by itself: -log p[label], at temperature 1, in nats.
        gradient: [C, V], of the divergences with respect to what the student's softmax was taken of; or sparse, at
            temperature 1 alone.
    """

    divergences: Tensor
    teacher_losses: Tensor
    gradient: Tensor | SparseGradient


class Targets(Protocol):
    """What a teacher says of N tokens."""

    def entropies(self) -> Tensor:
        """Of its distribution for each token, [N], at temperature 1, in nats."""
        ...

    def compare(self, tokens: slice, log_student_CV: Tensor, labels_C1: Tensor) -> Comparison:
        """Compare with the student's distributions.

        Args:
            tokens: which of the N; chunks come in order, all but the last of the same length.
            log_student_CV: log-probabilities at the temperature; probabilities afterwards.
            labels_C1: int64, a token of the vocabulary each.
        """
        ...


class Teacher(Protocol):
    """Anything with targets."""

    def targets(self, inputs: Inputs, *, following_BS: Tensor, origins: Origins) -> Targets:
        """For the tokens of a micro-batch, [B, S].

        Args:
            inputs: what the student reads.
            following_BS: the token after each, whether it counts or not.
            origins: of the rows.
        """
        ...


class OnlineTeacher:
    """A model that reads the same tokens, without gradients, in its own precision; it stops at hidden states.

    Args:
        model: of the student's vocabulary, whatever its other sizes; frozen here.
        divergence: which.
        temperature: of both distributions.
        chunk_tokens: tokens whose logits exist at the same time.
    """

    def __init__(
        self, model: PreTrainedModel, *, divergence: Divergence, temperature: float, chunk_tokens: int
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self._divergence, self._temperature, self._chunk_tokens = divergence, temperature, chunk_tokens

    @torch.no_grad()
    def targets(self, inputs: Inputs, *, following_BS: Tensor, origins: Origins) -> Targets:
        """See `Teacher.targets`."""
        del following_BS, origins  # it reads the tokens themselves
        head = head_of(self.model)
        with torch.autocast(head.weight.device.type, enabled=False):
            hidden_BSD = backbone(self.model)(**inputs.keywords()).last_hidden_state
        return LogitTargets(
            hidden_BSD,
            head,
            divergence=self._divergence,
            temperature=self._temperature,
            chunk_tokens=self._chunk_tokens,
        )


class LogitTargets:
    """Hidden states and a head.

    Args:
        hidden_BSD: last hidden states, after the final norm.
        head: products run in its dtype.
        divergence, temperature, chunk_tokens: see `OnlineTeacher`.
    """

    def __init__(
        self,
        hidden_BSD: Tensor,
        head: Head,
        *,
        divergence: Divergence,
        temperature: float,
        chunk_tokens: int,
    ) -> None:
        self._hidden_BSD, self._head = hidden_BSD, head
        self._divergence, self._temperature, self._chunk_tokens = divergence, temperature, chunk_tokens
        self._scratch = Scratch()
        self._ahead = self._logits()

    @torch.no_grad()
    def entropies(self) -> Tensor:
        """See `Targets.entropies`."""
        found = []
        for _, _, logits_CV in self._logits():
            log_CV = self._log_softmax(logits_CV)
            p_CV = torch.exp(log_CV, out=self._scratch.take("p", like=log_CV, dtype=log_CV.dtype))
            found.append(-inner(p_CV, log_CV))
        return torch.cat(found)

    @torch.no_grad()
    def compare(self, tokens: slice, log_student_CV: Tensor, labels_C1: Tensor) -> Comparison:
        """See `Targets.compare`."""
        own_tokens, _, logits_CV = next(self._ahead)
        assert own_tokens == tokens, "the teacher's chunks are the student's"
        log_CV = self._log_softmax(logits_CV)
        losses_C = -log_CV.gather(1, labels_C1)[:, 0]
        if self._temperature != 1:
            log_CV.copy_(logits_CV).div_(self._temperature)
            log_CV.sub_(log_CV.logsumexp(-1, keepdim=True))
        log_CV = log_CV.to(log_student_CV.dtype)
        return Comparison(self._divergence(log_student_CV, log_CV, self._scratch), losses_C, log_CV)

    def _logits(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        return chunked_logits(self._hidden_BSD, self._head, chunk_tokens=self._chunk_tokens)

    def _log_softmax(self, logits_CV: Tensor) -> Tensor:
        log_CV = self._scratch.take("log probabilities", like=logits_CV, dtype=sum_dtype(logits_CV))
        return torch.log_softmax(logits_CV, -1, dtype=log_CV.dtype, out=log_CV)
