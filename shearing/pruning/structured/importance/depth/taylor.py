"""Importance of layers by Taylor: what the loss would lose with their weights, to first order.

Legend: L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.gradients.matrix_gradients import gradients_by_place, kept_bytes
from shearing.pruning.structured.importance.metric import Cost, Evidence, Scores
from shearing.pruning.structured.importance.text_loss import finite, number_of_labels, require_labels, sum_of_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROTECTED = (1 / 8, 1 / 16)
"""Shares of the layers at both ends: 4 and 2 of 32."""


class LayerTaylor:
    """Sum over all parameters of a layer or sub-layer of |w g|, g of the mean loss (arXiv 2402.02834); see `Metric`.

    Args:
        protect: the form that is called "+" there: the first layers and the last ones go last. Published are the first
            4 and the last 2 of 32; we take the same shares, an eighth and a sixteenth, rounded, of models of any depth.
            It knows whole layers alone.
    """

    def __init__(self, *, protect: bool = False) -> None:
        self._protect = protect

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """One for each batch of the text and layer."""
        return source.num_hidden_layers * len(evidence.own)

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """The text forward and backward once; for that, each layer computes it once more."""
        tokens = evidence.text_tokens
        kept = kept_bytes(source, tokens=tokens)
        return Cost(forward_tokens=2 * tokens, backward_tokens=tokens, kept_bytes=kept)

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `LayerTaylor`."""
        labels = require_labels(number_of_labels(evidence.text))
        batches, processes = [share.inputs for share in evidence.own], evidence.processes

        def loss_of(batch: int, hidden_BSD: Tensor, _head: Tensor) -> Tensor:
            loss = sum_of_losses(model, hidden_BSD, batches[batch]) / labels
            finite(float(loss.detach()), metric="layer_taylor")
            return loss

        sums = torch.zeros(2, model.config.num_hidden_layers, dtype=torch.float64)
        places = gradients_by_place(
            model, batches, loss_of=loss_of, parameters=lambda layer: list(layer.parameters()), outside=False
        )
        for place in places:
            assert place.layer is not None
            gradients = {parameter: torch.zeros_like(parameter) for parameter in place.parameters}
            for of_batch in place.of_rows:
                for total, gradient in zip(gradients.values(), of_batch, strict=True):
                    total += gradient
                advance(1)
            turn = place.layer % processes.size
            for total in gradients.values():
                processes.sum_on(total, rank=turn)
            if turn == processes.rank:
                sums[:, place.layer] = _by_sublayer(model, place.layer, gradients)
        # Rounded one by one, as they are compared.
        of_kind = dict(zip(("attention", "mlp"), processes.sum(sums).float(), strict=True))
        layers = of_kind["attention"] + of_kind["mlp"]
        return {"layers": protected(layers)} if self._protect else {"layers": layers, **of_kind}


def _by_sublayer(model: PreTrainedModel, index: int, gradients: dict[nn.Parameter, Tensor]) -> Tensor:
    """Sums of |w g| of attention and MLP [2], each with its norms."""
    layer = decoder_layers(model)[index]
    parameters = dict(layer.named_parameters())
    of_kind = [
        sum(
            float((weight.detach().double() * gradients[weight].double()).abs().sum())
            for weight in (parameters[parameter.name] for parameter in sublayer.parameters)
        )
        for sublayer in anatomy_of(model).sublayers.values()
    ]
    return torch.tensor(of_kind, dtype=torch.float64)


def protected(scores: Tensor) -> Tensor:
    """Scores [L] whose first eighth and last sixteenth are above all others, and in their own order."""
    depth = scores.numel()
    first, last = (round(share * depth) for share in _PROTECTED)
    raised = scores.clone()
    height = scores.max() - scores.min() + 1
    raised[:first] += height
    raised[depth - last :] += height
    return raised
