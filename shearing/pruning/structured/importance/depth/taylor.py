"""Importance of layers by Taylor: what the loss would lose with their weights, to first order.

Legend: L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shearing.models.anatomy import anatomy_of, backbone, decoder_layers
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.gradients.matrix_gradients import differentiable
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
        """One for each batch of the text."""
        del source
        return len(evidence.text)

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """The text forward and backward once."""
        del source
        return Cost(forward_tokens=evidence.text_tokens, backward_tokens=evidence.text_tokens)

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `LayerTaylor`."""
        owners = _owners(model)
        parameters = [parameter for owned in owners.values() for parameter in owned]
        labels = require_labels(number_of_labels(evidence.text))
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        with differentiable(parameters), torch.enable_grad():
            for batch in evidence.text:
                hidden = backbone(model)(**batch.keywords()).last_hidden_state
                loss = sum_of_losses(model, hidden, batch) / labels
                finite(float(loss.detach()), metric="Taylor of layers")
                for total, gradient in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
                    total += gradient
                advance(1)
        left = iter(gradients)
        sums = {
            owner: sum(float((weight.detach().double() * next(left).double()).abs().sum()) for weight in owned)
            for owner, owned in owners.items()
        }
        of_kind = {
            kind: torch.tensor([value for (of, _), value in sums.items() if of == kind])
            for kind in ("attention", "mlp")
        }
        layers = of_kind["attention"] + of_kind["mlp"]
        return {"layers": protected(layers)} if self._protect else {"layers": layers, **of_kind}


def _owners(model: PreTrainedModel) -> dict[tuple[str, int], list[nn.Parameter]]:
    """(sub-layer, layer) -> its parameters, with its norms."""
    owners: dict[tuple[str, int], list[nn.Parameter]] = {}
    for index, layer in enumerate(decoder_layers(model)):
        parameters = dict(layer.named_parameters())
        for kind, sublayer in anatomy_of(model).sublayers.items():
            owners[kind, index] = [parameters[parameter.name] for parameter in sublayer.parameters]
    return owners


def protected(scores: Tensor) -> Tensor:
    """Scores [L] whose first eighth and last sixteenth are above all others, and in their own order."""
    depth = scores.numel()
    first, last = (round(share * depth) for share in _PROTECTED)
    raised = scores.clone()
    height = scores.max() - scores.min() + 1
    raised[:first] += height
    raised[depth - last :] += height
    return raised
