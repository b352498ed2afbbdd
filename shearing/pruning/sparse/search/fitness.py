"""What a candidate is worth: one forward pass of the model that it makes, on text that calibration did not see.

Legend: B sequences, S inputs of a sequence, T = S + 1 tokens, d hidden, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shearing.data.documents import IGNORED_LABEL
from shearing.pruning.calibration.text import Calibration, num_counted
from shearing.pruning.calibration.whole import WholeModel
from shearing.pruning.sparse.allocation.allocator import Request, Unit
from shearing.pruning.sparse.search.database import Database
from shearing.pruning.sparse.search.genome import Genome

FitnessKind = Literal["loss", "kl"]
_HOPELESS = 1e30  # for sums that are not finite: such candidates come last, and JSON has no infinity


@dataclass(frozen=True)
class Training:
    """What a candidate learns before it is compared.

    Attributes:
        steps: of Adam, under the candidate's masks; 0: it is compared as it is.
        learning_rate: constant.
        batch: sequences of a step, calibration text in its order, again from the first after the last.
    """

    steps: int = 0
    learning_rate: float = 1e-5
    batch: int = 4


class Fitness:
    """Mean loss in nats per token of the model that a candidate makes; lower is better.

    With `training`, of the model that it becomes by a few steps: its matrices are trained, what is zero in them stays
    zero, and for the next candidate all are made anew (the offspring selection of DarwinLM, arXiv 2502.07780).

    Text is read in stages, each the beginning of the next, so that most candidates cost little. What a candidate's
    first stages gave is kept and only the rest is read.

    Args:
        request: the dense model, which is loaded once and changed in place.
        database: its matrices at every level.
        text: [samples, T].
        stages: number of sequences that each stage reads, rising to all.
        kind: loss: cross-entropy of the next token; kl: divergence KL(dense || candidate) of its prediction.
        known: sums over rows by candidate that an earlier process has found: [rows read, sum].
        training: of candidates, on the calibration text of `request`.
    """

    def __init__(
        self,
        request: Request,
        *,
        database: Database,
        text: Calibration,
        stages: Sequence[int],
        kind: FitnessKind,
        known: Mapping[Genome, tuple[int, float]] | None = None,
        training: Training = Training(),
    ) -> None:
        compute = request.compute
        self._units: Sequence[Unit] = request.units
        self._database, self._stages, self._kind = database, list(stages), kind
        self._micro_batch_size = compute.micro_batch_size
        self._device, self._text = compute.device, text
        _, labels_BS = text.predictions(slice(None), device=torch.device("cpu"))
        self._counted: list[int] = (labels_BS != IGNORED_LABEL).sum(1).cumsum(0).tolist()  # up to each row
        # Adam's steps are far below what bf16 tells apart.
        dtype = torch.float32 if training.steps else compute.dtype
        self._model = WholeModel(
            request.source, device=compute.device, dtype=dtype, attention_within=text.attention_within
        )
        self._now: list[int | None] = [None] * len(self._units)
        self._sums: dict[Genome, tuple[int, float]] = dict(known or {})
        self._dense = self._states_of_dense() if kind == "kl" else None
        self._training = training
        self._lessons: Calibration | None = None
        if training.steps:
            assert request.calibration is not None
            self._lessons = request.calibration
        self._trained: Genome | None = None
        self.passes = self.tokens = 0

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return len(self._stages)

    @property
    def known(self) -> dict[Genome, tuple[int, float]]:
        """Rows read and sum of their losses, of every candidate that was looked at."""
        return dict(self._sums)

    def __call__(self, genome: Genome, stage: int) -> float:
        """Mean over the tokens of a stage, nats; waits for the device."""
        rows = self._stages[stage]
        read, total = self._sums.get(genome, (0, 0.0))
        if read < rows:
            self._make(genome)
            if self._lessons is not None:
                self._train(genome, text=self._lessons)
            total += self._sum(read, rows)
            read = rows
            self._sums[genome] = (read, total)
        # A candidate that has come further is compared by all that is known of it.
        return total / max(1, self._counted[read - 1])

    @torch.no_grad()
    def _make(self, genome: Genome) -> None:
        if self._trained not in (None, genome):
            self._trained, self._now = None, [None] * len(self._units)
        for index, (unit, level) in enumerate(zip(self._units, genome, strict=True)):
            if self._now[index] != level:
                for matrix in unit.matrices:
                    self._database.put(self._model.parameter(matrix.name), name=matrix.name, level=level)
                self._now[index] = level

    def _train(self, genome: Genome, *, text: Calibration) -> None:
        """The same steps for the same candidate, however often it is made."""
        if self._trained == genome:
            return
        names = [matrix.name for unit in self._units for matrix in unit.matrices]
        weights = {name: self._model.parameter(name).requires_grad_() for name in names}
        gone = {name: weight == 0 for name, weight in weights.items()}
        optimizer = torch.optim.Adam(weights.values(), lr=self._training.learning_rate)
        for step in range(self._training.steps):
            first = step * self._training.batch
            rows = [(first + row) % len(text.tokens) for row in range(self._training.batch)]
            inputs, labels_BS = text.predictions(rows, device=self._device)
            (self._model.loss(self._model.states(inputs), labels_BS) / num_counted(labels_BS)).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.masked_fill_(gone[name], 0.0)
            self.tokens += 3 * labels_BS.numel()
        for weight in weights.values():
            weight.requires_grad = False
        self._trained = genome

    @torch.no_grad()
    def _sum(self, first: int, last: int) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for rows in self._parts(first, last):
            inputs, labels_BS = self._text.predictions(rows, device=self._device)
            states_BSD = self._model.states(inputs)
            if self._dense is None:
                total += self._model.losses(states_BSD, labels_BS).sum(dtype=torch.float64)
            else:
                total += divergence(self._dense[rows], states_BSD, labels_BS, model=self._model)
            self.tokens += labels_BS.numel()
        self.passes += 1
        found = float(total)
        return found if math.isfinite(found) else _HOPELESS

    @torch.no_grad()
    def _states_of_dense(self) -> Tensor:
        """What predictions of the dense model are made from [samples, S, d]: S x V of them would be far larger."""
        parts = self._parts(0, len(self._text.tokens))
        return torch.cat([self._model.states(self._text.predictions(part, device=self._device)[0]) for part in parts])

    def _parts(self, first: int, last: int) -> Iterator[slice]:
        """Rows that are on the device together."""
        for start in range(first, last, self._micro_batch_size):
            yield slice(start, min(start + self._micro_batch_size, last))


def divergence(dense_BSD: Tensor, states_BSD: Tensor, labels_BS: Tensor, *, model: WholeModel) -> Tensor:
    """Sum of KL(p || q) over tokens whose label counts, p and q what is predicted from either, in nats; fp64 scalar."""
    total, first = torch.zeros((), dtype=torch.float64, device=states_BSD.device), 0
    counts_N = (labels_BS != IGNORED_LABEL).flatten()
    for dense_CV, logits_CV in zip(model.logits(dense_BSD), model.logits(states_BSD), strict=True):
        p, q = dense_CV.float().log_softmax(-1), logits_CV.float().log_softmax(-1)
        uncounted_C1 = ~counts_N[first : first + len(p), None]
        total += (p.exp() * (p - q)).masked_fill_(uncounted_C1, 0.0).sum(dtype=torch.float64)
        first += len(p)
    return total
