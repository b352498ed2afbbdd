"""Structural importance with adaptive ratios: two Taylor importances in one, and less of layers where it fluctuates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shearing.pruning.structured.importance.gradients.taylor import (
    BY_ELEMENTS,
    BY_VECTORS,
    TaylorMetric,
    as_scores,
    sums_of_rows,
)
from shearing.pruning.structured.importance.metric import Evidence, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Structural(TaylorMetric):
    """A reconstruction of SAAP (arXiv 2412.15127), whose exact rules are not public; see `Metric`.

    For each row n of the text, two importances of a unit: vector by vector I1 = Σ |Σ_k w_k g_k| and element by element
    I2 = Σ |w g|, as LLM-Pruner has them. The paper weighs them as outputs with Gaussian noise of learned deviations,

        I = I1 / (2 σ1²) + I2 / (2 σ2²) + log σ1 σ2,

    which over all units of a granularity is least at σ² = the mean of I1 and of I2: so I = (I1 / mean I1 + I2 / mean
    I2) / 2, up to a constant. A layer whose share of the importance of its kind fluctuates from row to row loses more:
    a unit scores its I, on the mean over rows, divided by 1 + (standard deviation / mean over rows of the share).
    """

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `Structural`."""
        rows = sums_of_rows(model, evidence=evidence, kinds=(BY_VECTORS, BY_ELEMENTS), advance=advance)
        fused = {}
        for name in ("kv_groups", "query_heads", "intermediate"):
            vectors, elements = (torch.stack([of_row[kind][name] for of_row in rows]) for kind in (0, 1))
            fused[name] = _fused(vectors, elements)
        return as_scores(fused)


def _fused(vectors_NLu: Tensor, elements_NLu: Tensor) -> Tensor:
    """Scores [L, …] of one granularity from both importances of N rows."""
    fused = sum(part / (2 * part.mean()) for part in (vectors_NLu, elements_NLu))
    assert isinstance(fused, Tensor)
    of_layers_NL = fused.flatten(2).sum(2)
    shares_NL = of_layers_NL / of_layers_NL.sum(1, keepdim=True)
    fluctuation_L = shares_NL.std(0, correction=0) / shares_NL.mean(0)
    return fused.mean(0) / (1 + fluctuation_L).view(-1, *[1] * (fused.ndim - 2))
