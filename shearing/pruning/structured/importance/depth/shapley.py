"""Importance of layers in random company: how much better half of a model is with them than without.

Shapes: B sequences, S positions, D hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shearing.data.documents import Inputs
from shearing.models.anatomy import Head, head_of
from shearing.models.shape import Shape
from shearing.models.stored.paging.on_demand import weights_here
from shearing.pruning.calibration.shares import shares_of
from shearing.pruning.structured.importance.depth.passage import (
    Passage,
    SubLayers,
    as_scores,
    cost_of,
    parts_of,
)
from shearing.pruning.structured.importance.metric import STEP_SEQUENCES, Cost, Evidence, Scores
from shearing.pruning.structured.importance.text_loss import finite, number_of_labels, require_labels, sum_of_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ShapleyLike:
    """Mean harm over subnetworks without a part minus that over subnetworks with it (arXiv 2407.16286); see `Metric`.

    Subnetworks have half of the parts, drawn by the seed, new ones for every `STEP_SEQUENCES` sequences (4). They come
    in pairs: one, and what it leaves out, so that every part is as often there as not, on the same text. (Published:
    independent draws.)

    Args:
        parts: `layers`; or `sublayers`: attention and MLP apart, on one scale.
        harm: `loss`, in nats a token; or `logits`: mean over tokens of the Euclidean distance to the whole model's.
        pairs: of subnetworks for the same sequences; each pair costs one pass over them.
    """

    def __init__(self, *, parts: str = "layers", harm: str = "loss", pairs: int = 16) -> None:
        self._parts, self._harm, self._pairs = parts, harm, pairs

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """One for each pair and piece of a step."""
        del source
        return self._pairs * len(_own_pieces(evidence))

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """One pass for each pair; at most two where sub-layers go alone, as a layer without one of them is computed."""
        L, d, tokens = source.num_hidden_layers, source.hidden_size, evidence.text_tokens
        layers = self._pairs * L * (1 if self._parts == "layers" else 2)
        if self._harm == "loss":
            return cost_of(source, layers=layers, heads=2 * self._pairs, tokens=tokens)
        flops = 2.0 * source.vocab_size * d**2 + 2.0 * d**2 * 2 * self._pairs * tokens
        return cost_of(source, layers=layers + L, heads=0, tokens=tokens, other_flops=flops)

    @torch.no_grad()
    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `ShapleyLike`."""
        parts = parts_of(self._parts, layers=model.config.num_hidden_layers)
        generator = torch.Generator().manual_seed(evidence.seed)
        require_labels(number_of_labels(evidence.text))
        head, gram = head_of(model) if self._harm == "logits" else None, None
        if head is not None and head.cap is None:
            with weights_here(head.weight):
                gram = gram_of(head)
        own = _own_pieces(evidence)
        totals = torch.zeros(len(parts), dtype=torch.float64)
        for number, step in enumerate(evidence.steps):
            # Every process draws for every step, so that what is drawn does not depend on who reads it.
            drawn = [torch.randperm(len(parts), generator=generator) for _ in range(self._pairs)]
            for piece in (piece for of_step, piece in own if of_step == number):
                harm = _Harm(model, piece, step=step, head=head, gram=gram)
                for of_pair in drawn:
                    first, second = of_pair[: len(parts) // 2], of_pair[len(parts) // 2 :]
                    without_first, without_second = (
                        harm.without(frozenset().union(*(parts[part] for part in absent.tolist())))
                        for absent in (first, second)
                    )
                    totals[first] += without_first - without_second
                    totals[second] += without_second - without_first
                    advance(1)
        totals = evidence.processes.sum(totals)
        return as_scores(self._parts, totals / (self._pairs * len(evidence.steps)))


def _own_pieces(evidence: Evidence) -> list[tuple[int, Inputs]]:
    """Rows of this process, equally many on each, and the number of the step that they are of."""
    pieces = [piece for step in evidence.steps for piece in step]
    shares = shares_of(pieces, processes=evidence.processes)
    return [(share.numbers.start // STEP_SEQUENCES, share.inputs) for share in shares]


class _Harm:
    """What leaving parts out does to a step, as far as some of its rows say; of all of them it is the sum.

    Args:
        model: plain model.
        piece: these rows.
        step: all rows.
        head: of the model, where logits are compared; None: the loss counts.
        gram: see `logit_distances`.
    """

    def __init__(
        self, model: PreTrainedModel, piece: Inputs, *, step: Sequence[Inputs], head: Head | None, gram: Tensor | None
    ) -> None:
        self._model, self._piece, self._head, self._gram = model, piece, head, gram
        self._labels, self._tokens = max(1, number_of_labels(step)), sum(rows.tokens.numel() for rows in step)
        self._passage = Passage(model, piece)
        self._whole = None if head is None else self._passage.to_end(self._passage.stream, gone=frozenset())

    def without(self, gone: SubLayers) -> float:
        hidden = self._passage.to_end(self._passage.stream, gone=gone)
        if self._whole is None or self._head is None:
            total = float(sum_of_losses(self._model, hidden, self._piece)) / self._labels
        else:
            with weights_here(self._head.weight):
                distances = logit_distances(self._whole, hidden, head=self._head, gram=self._gram)
            total = float(distances.sum()) / self._tokens
        return finite(total, metric="shapley")


def gram_of(head: Head) -> Tensor:
    """WᵀW [D, D] of a head without a cap, W what it multiplies hidden states by."""
    weight = head.weight.float() / head.divisor
    return weight.T @ weight


def logit_distances(whole: Tensor, hidden: Tensor, *, head: Head, gram: Tensor | None) -> Tensor:
    """Euclidean distances of the logits of two models with the same head: [B, S].

    |W (h - h')|² = (h - h')ᵀ WᵀW (h - h'), so without logits where the head has no cap.

    Args:
        whole, hidden: hidden states [B, S, D] after the final norm.
        head: of both.
        gram: `gram_of` it; None: it has a cap.
    """
    if gram is None:
        rows = zip(whole, hidden, strict=True)
        return torch.stack(
            [(head.logits(one).float() - head.logits(other).float()).norm(dim=-1) for one, other in rows]
        )
    difference = (whole - hidden).float()
    return ((difference @ gram) * difference).sum(-1).clamp_min(0).sqrt()
