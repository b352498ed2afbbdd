"""Importance by a Taylor expansion of the loss: what it would change if the weights of a unit were zero.

A unit's weights are all that it is coupled with: the rows of queries, keys, values, gate and up projections that write
it, the columns of what reads it, and for a hidden dimension the rows and columns of everything on the residual stream.

Legend: w a weight, G_n the gradient of the loss summed over the c_n labels of row n of N, c the sum of c_n.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shearing.data.documents import Inputs
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.gradients.matrix_gradients import (
    Labels,
    LabelsOfModel,
    Place,
    RowGradients,
    kept_bytes,
    labels_of_text,
)
from shearing.pruning.structured.importance.metric import Cost, Evidence, Scores
from shearing.pruning.structured.importance.text_loss import require_labels
from shearing.pruning.structured.importance.unit_sums import Of, UnitSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sums = dict[nn.Parameter, Tensor]
"""Matrix -> as many sums."""

Term = Callable[[Tensor, int], Tensor]
"""What a row adds to the sums of a matrix: from the gradient of its loss, which may change, and its number of labels.
"""


class TaylorMetric(ABC):
    """One forward and one backward pass over the text, row by row."""

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """One for each row of the text and layer."""
        return source.num_hidden_layers * sum(share.inputs.tokens.shape[0] for share in evidence.own)

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """One forward and one backward pass over the text; for that, each layer computes it once more."""
        tokens = evidence.text_tokens
        kept = kept_bytes(source, tokens=tokens)
        return Cost(forward_tokens=2 * tokens, backward_tokens=tokens, kept_bytes=kept)

    @abstractmethod
    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See the class."""


class FirstOrder(TaylorMetric):
    """Σ |w g| over a unit's weights, g = Σ_n G_n / c: LLM-Pruner (arXiv 2305.11627), `param_first`; see `Metric`."""

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `FirstOrder`."""
        units = UnitSums(model)
        for place, text, (sums,) in sums_over_rows(
            model, evidence=evidence, terms=(lambda gradient, _: gradient,), advance=advance
        ):
            _add(units, place, of=partial(_first_order, sums=sums, labels=text.labels))
        return as_scores(units.sums(evidence.processes))


class SecondOrder(TaylorMetric):
    """Σ |w g - ½ w² F|, g = Σ_n G_n / c and F = mean over rows of (G_n / c_n)²: LLM-Pruner's `param_mix`; see `Metric`.

    F is of gradients that are means over a row, so it is smaller than the curvature of the loss by about the number of
    labels of a row, and the first order decides (docs/methods.md).
    """

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `SecondOrder`."""
        units = UnitSums(model)
        terms: tuple[Term, ...] = (
            lambda gradient, _: gradient,
            lambda gradient, count: (gradient / max(count, 1)).square_(),
        )
        for place, text, (sums, squares) in sums_over_rows(model, evidence=evidence, terms=terms, advance=advance):
            _add(units, place, of=partial(_second_order, sums=sums, squares=squares, text=text))
        return as_scores(units.sums(evidence.processes))


class VectorOrder(TaylorMetric):
    """Σ over a unit's rows and columns of mean over rows n of the text of |Σ_k w_k (G_n)_k / c_n|; see `Metric`.

    LLM-Pruner's `vectorize`, but one row at a time: it takes the absolute value of the gradient summed over all
    samples, in which they cancel, and at a minimum of the loss all do.
    """

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `VectorOrder`."""
        rows = sums_of_rows(model, evidence=evidence, kinds=(BY_VECTORS,), advance=advance)
        return as_scores({name: torch.stack([row[name] for (row,) in rows]).mean(0) for name in rows[0][0]})


class Distillation(TaylorMetric):
    """Σ ½ w² F, F = Σ_n G_n² / c with labels drawn from the model: what leaving a weight out does to the distance
    KL(source ‖ model) per token; see `Metric`.

    The model is the source, so this distance is at its minimum of zero and its gradient is zero: a first order there is
    not. Its second derivative is the Fisher information of the model's own distribution; the labels of a row are drawn
    independently, so the mean of G_n² is that of the sum over its tokens, whatever the length of the row. The expansion
    is Optimal Brain Damage's (LeCun et al., 1989) on the distance that distillation minimises.
    """

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `Distillation`."""
        units = UnitSums(model)
        for place, information in fisher_information(model, evidence=evidence, advance=advance):
            _add(units, place, of=partial(_half_curvature, information=information))
        return as_scores(units.sums(evidence.processes))


def fisher_information(
    model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[Place, Sums]]:
    """Diagonal of the Fisher information of the model's predictions on a text, per token, for every matrix.

    Args:
        model: plain model.
        evidence: text, and the seed of the labels that are drawn.
        advance: called with 1 after every row and layer.

    Returns:
        For one place after the other its information; each place on one of the processes.
    """
    labels = LabelsOfModel(seed=evidence.seed)
    for row in _rows_before_own(evidence):
        labels.skip(model, row)
    terms: tuple[Term, ...] = (lambda gradient, _: gradient.square_(),)
    for place, text, (squares,) in sums_over_rows(
        model, evidence=evidence, terms=terms, labels=labels, advance=advance
    ):
        yield place, {matrix: total.div_(text.labels) for matrix, total in squares.items()}


@dataclass(frozen=True)
class _Text:
    """What all processes have read: labels that count, and rows that have some."""

    labels: int
    rows: int

    @classmethod
    def of(cls, counts: Sequence[int], *, evidence: Evidence) -> _Text:
        labels, rows = evidence.processes.sum(torch.tensor([sum(counts), sum(map(bool, counts))])).tolist()
        return cls(require_labels(labels), rows)


def sums_over_rows(
    model: PreTrainedModel,
    *,
    evidence: Evidence,
    terms: Sequence[Term],
    labels: Labels = labels_of_text,
    advance: Callable[[int], None],
) -> Iterator[tuple[Place, _Text, list[Sums]]]:
    """For one place of the model after the other, sums of each term over the rows of all processes, fp32.

    Each place comes on one of the processes in turn, which alone has its sums; all have to ask to the end.
    """
    processes = evidence.processes
    gradients, text = RowGradients(model, _rows(evidence), labels=labels), None
    for number, place in enumerate(gradients.places()):
        sums = [{matrix: torch.zeros_like(matrix, dtype=torch.float32) for matrix in place.parameters} for _ in terms]
        for row, of_matrices in enumerate(place.of_rows):
            count = gradients.counts[row]
            for matrix, gradient in zip(place.parameters, of_matrices, strict=True):
                for of_term, term in zip(sums, terms, strict=True):
                    of_term[matrix] += term(gradient, count)
            if place.layer is not None:
                advance(1)
        if text is None:
            text = _Text.of(gradients.counts, evidence=evidence)
        turn = number % processes.size
        for of_term in sums:
            for total in of_term.values():
                processes.sum_on(total, rank=turn)
        if turn == processes.rank:
            yield place, text, sums


@dataclass(frozen=True)
class Kind:
    """One way to sum up the products w G_n / c_n of a row n by unit: what of each product, and what of each vector."""

    of_product: Callable[[Tensor], Tensor]
    of_vector: Callable[[Tensor], Tensor]


BY_VECTORS = Kind(of_product=lambda products: products, of_vector=torch.abs)
"""Σ |Σ_k w_k g_k| over the rows and columns of every unit."""

BY_ELEMENTS = Kind(of_product=torch.abs, of_vector=lambda sums: sums)
"""Σ |w g| over the weights of every unit."""


def sums_of_rows(
    model: PreTrainedModel, *, evidence: Evidence, kinds: Sequence[Kind], advance: Callable[[int], None]
) -> list[list[dict[str, Tensor]]]:
    """Sums by unit for each row of the text that has labels, of all processes, and each kind."""
    rows = _rows(evidence)
    gradients = RowGradients(model, rows)
    units = [[UnitSums(model, of_vector=kind.of_vector) for kind in kinds] for _ in rows]
    for place in gradients.places():
        for row, of_matrices in enumerate(place.of_rows):
            count = max(gradients.counts[row], 1)
            products = {
                matrix: gradient.mul_(matrix.detach()).div_(count)
                for matrix, gradient in zip(place.parameters, of_matrices, strict=True)
            }
            for of_kind, kind in zip(units[row], kinds, strict=True):
                _add(of_kind, place, of=partial(_products, products=products, kind=kind))
            if place.layer is not None:
                advance(1)
    counts = gradients.counts
    _Text.of(counts, evidence=evidence)
    own = [[of_kind.sums() for of_kind in of_row] for of_row, count in zip(units, counts, strict=True) if count]
    return [of_row for of_process in evidence.processes.gather(own) for of_row in of_process]


def _add(units: UnitSums, place: Place, *, of: Of) -> None:
    if place.layer is not None:
        units.add_layer(place.layer, of)
    for parameter in () if place.layer is not None else place.parameters:
        units.add_outer(parameter, of)


def _first_order(w: nn.Parameter, *, sums: Sums, labels: int) -> Tensor:
    return (_double(w) * _double(sums[w]) / labels).abs()


def _second_order(w: nn.Parameter, *, sums: Sums, squares: Sums, text: _Text) -> Tensor:
    weight = _double(w)
    first = weight * _double(sums[w]) / text.labels
    return (first - weight.square() * _double(squares[w]) / (2 * text.rows)).abs()


def _half_curvature(w: nn.Parameter, *, information: Sums) -> Tensor:
    return _double(w).square() * _double(information[w]) / 2


def _products(w: nn.Parameter, *, products: Sums, kind: Kind) -> Tensor:
    return kind.of_product(_double(products[w]))


def _rows(evidence: Evidence) -> list[Inputs]:
    return [row for share in evidence.own for row in share.inputs.rows()]


def _rows_before_own(evidence: Evidence) -> list[Inputs]:
    rows = [row for batch in evidence.text for row in batch.rows()]
    return rows[: len(rows) * evidence.processes.rank // evidence.processes.size]


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def as_scores(sums: dict[str, Tensor]) -> Scores:
    """Sums by unit in fp32."""
    return {name: values.float() for name, values in sums.items()}
