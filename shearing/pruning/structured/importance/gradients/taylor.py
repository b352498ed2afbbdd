"""Importance by a Taylor expansion of the loss: what it would change if the weights of a unit were zero.

A unit's weights are all that it is coupled with: the rows of queries, keys, values, gate and up projections that write
it, the columns of what reads it, and for a hidden dimension the rows and columns of everything on the residual stream.

Legend: w a weight, G_n the gradient of the loss summed over the c_n labels of row n of N, c the sum of c_n.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shearing.data.documents import Inputs
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.gradients.matrix_gradients import (
    LabelsOfModel,
    matrices_of,
    matrix_gradients,
)
from shearing.pruning.structured.importance.metric import Cost, Evidence, Scores
from shearing.pruning.structured.importance.text_loss import require_labels
from shearing.pruning.structured.importance.unit_sums import unit_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sums = dict[nn.Parameter, Tensor]
"""Matrix -> as many sums."""


class TaylorMetric(ABC):
    """One forward and one backward pass over the text, row by row."""

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """One for each row of the text."""
        del source
        return sum(batch.tokens.shape[0] for batch in evidence.text)

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """One forward and one backward pass over the text."""
        del source
        return Cost(forward_tokens=evidence.text_tokens, backward_tokens=evidence.text_tokens)

    @abstractmethod
    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See the class."""


class FirstOrder(TaylorMetric):
    """Σ |w g| over a unit's weights, g = Σ_n G_n / c: LLM-Pruner (arXiv 2305.11627), `param_first`; see `Metric`.

    Holds one copy of the model's matrices, the sums of their gradients.
    """

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `FirstOrder`."""
        total, sums = 0, _zeros(model)
        for row in _rows(evidence):
            with matrix_gradients(model, row) as (count, gradients):
                for matrix, gradient in gradients:
                    sums[matrix] += gradient
            total += count
            advance(1)
        require_labels(total)
        return as_scores(unit_sums(model, of=lambda w: (_double(w) * _double(sums[w]) / total).abs()))


class SecondOrder(TaylorMetric):
    """Σ |w g - ½ w² F|, g = Σ_n G_n / c and F = mean over rows of (G_n / c_n)²: LLM-Pruner's `param_mix`; see `Metric`.

    Holds two copies of the model's matrices. F is of gradients that are means over a row, so it is smaller than the
    curvature of the loss by about the number of labels of a row, and the first order decides (docs/methods.md).
    """

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `SecondOrder`."""
        total, rows, sums, squares = 0, 0, _zeros(model), _zeros(model)
        for row in _rows(evidence):
            with matrix_gradients(model, row) as (count, gradients):
                for matrix, gradient in gradients:
                    sums[matrix] += gradient
                    squares[matrix] += (gradient / max(count, 1)).square_()
            total += count
            rows += count > 0
            advance(1)
        require_labels(total)

        def change(w: nn.Parameter) -> Tensor:
            weight = _double(w)
            return (weight * _double(sums[w]) / total - weight.square() * _double(squares[w]) / (2 * rows)).abs()

        return as_scores(unit_sums(model, of=change))


class VectorOrder(TaylorMetric):
    """Σ over a unit's rows and columns of mean over rows n of the text of |Σ_k w_k (G_n)_k / c_n|; see `Metric`.

    LLM-Pruner's `vectorize`, but one row at a time: it takes the absolute value of the gradient summed over all
    samples, in which they cancel, and at a minimum of the loss all do.
    """

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `VectorOrder`."""
        rows = [
            sums_of_vectors(model, products) for products in products_of_rows(model, evidence=evidence, advance=advance)
        ]
        return as_scores({name: torch.stack([row[name] for row in rows]).mean(0) for name in rows[0]})


class Distillation(TaylorMetric):
    """Σ ½ w² F, F = Σ_n G_n² / c with labels drawn from the model: what leaving a weight out does to the distance
    KL(source ‖ model) per token; see `Metric`.

    The model is the source, so this distance is at its minimum of zero and its gradient is zero: a first order there is
    not. Its second derivative is the Fisher information of the model's own distribution; the labels of a row are drawn
    independently, so the mean of G_n² is that of the sum over its tokens, whatever the length of the row. The expansion
    is Optimal Brain Damage's (LeCun et al., 1989) on the distance that distillation minimises.

    Holds one copy of the model's matrices.
    """

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `Distillation`."""
        information = fisher_information(model, evidence=evidence, advance=advance)
        return as_scores(unit_sums(model, of=lambda w: _double(w).square() * _double(information[w]) / 2))


def fisher_information(
    model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
) -> Sums:
    """Diagonal of the Fisher information of the model's predictions on a text, per token, for every matrix.

    Args:
        model: plain model.
        evidence: text, and the seed of the labels that are drawn.
        advance: called with 1 after every row.
    """
    labels, total, squares = LabelsOfModel(seed=evidence.seed), 0, _zeros(model)
    for row in _rows(evidence):
        with matrix_gradients(model, row, labels=labels) as (count, gradients):
            for matrix, gradient in gradients:
                squares[matrix] += gradient.square_()
        total += count
        advance(1)
    require_labels(total)
    for sums in squares.values():
        sums /= total
    return squares


def products_of_rows(
    model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
) -> Iterator[Sums]:
    """Products w G_n / c_n of every weight, for each row n of the text that has labels."""
    total = 0
    for row in _rows(evidence):
        with matrix_gradients(model, row) as (count, gradients):
            products = {matrix: gradient.mul_(matrix.detach()).div_(max(count, 1)) for matrix, gradient in gradients}
        if count:
            yield products
        total += count
        advance(1)
    require_labels(total)


def sums_of_vectors(model: PreTrainedModel, products: Sums) -> dict[str, Tensor]:
    """Σ |Σ_k w_k g_k| over the rows and columns of every unit, of `products_of_rows`."""
    return unit_sums(model, of=lambda w: _double(products[w]), of_vector=torch.abs)


def sums_of_elements(model: PreTrainedModel, products: Sums) -> dict[str, Tensor]:
    """Σ |w g| over the weights of every unit, of `products_of_rows`."""
    return unit_sums(model, of=lambda w: _double(products[w]).abs())


def _rows(evidence: Evidence) -> Iterator[Inputs]:
    for batch in evidence.text:
        yield from batch.rows()


def _zeros(model: PreTrainedModel) -> Sums:
    return {matrix: torch.zeros_like(matrix, dtype=torch.float32, requires_grad=False) for matrix in matrices_of(model)}


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def as_scores(sums: dict[str, Tensor]) -> Scores:
    """Sums by unit in fp32."""
    return {name: values.float() for name, values in sums.items()}
