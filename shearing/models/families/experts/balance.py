"""The load-balancing loss of routers, carried on while weights are trained.

Of a layer and a sequence of S tokens, with the E experts that there are, of which each token is sent to K,

    E Σ_e f_e P_e,   f_e: tokens that are sent to e, over S;   P_e: mean over tokens of the router's probability of e,

the mean over layers (Switch Transformer, arXiv 2101.03961, equations 4 to 6; K where all is in balance). It is what
transformers' `load_balancing_loss_func` says of one layer and one sequence. That function pools all layers and all
sequences of a forward pass before it multiplies: then expert 5 of one layer counts with expert 5 of another, which
changes when experts are renumbered, and a step would depend on how its batch is shared out.

Legend: B sequences, S positions, T = B * S tokens, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.families.experts.masked import MaskedRouter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Heard(NamedTuple):
    """Of a router: logits of all tokens [T, E]; which experts [E], and whether the layer, are there; None: all is."""

    logits: Tensor
    alive: Tensor | None
    counts: Tensor | None


class RouterBalance:
    """How unevenly the routers of a model send tokens to experts; no module.

    Attributes:
        coefficient: of the loss: the config's `router_aux_loss_coef`.

    Args:
        layers: of the model.
        router: name of the router in a layer.
        per_token: K.
        coefficient: see above.
    """

    def __init__(self, layers: nn.ModuleList, *, router: str, per_token: int, coefficient: float) -> None:
        self._layers, self._router, self._per_token = layers, router, per_token
        self.coefficient = coefficient

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self | None:
        """Of a model, masked in place or not; None where it has no experts, or gives their balance no weight."""
        config: Any = model.config
        experts = anatomy_of(config).mlp.experts
        coefficient = float(getattr(config, "router_aux_loss_coef", 0.0))
        if experts is None or not coefficient:
            return None
        return cls(
            decoder_layers(model),
            router=experts.router,
            per_token=config.num_experts_per_tok,
            coefficient=coefficient,
        )

    @contextmanager
    def listening(self) -> Iterator[list[Heard]]:
        """What the routers say in the forward pass inside, layer by layer.

        Nothing is computed of it inside: a layer that is computed again in the backward pass would miss that.
        """
        heard: list[Heard] = []

        def listen(router: nn.Module, _arguments: Any, output: tuple[Tensor, ...]) -> None:
            alive = counts = None
            if isinstance(router, MaskedRouter):
                alive, counts = router.alive, router.counts
            heard.append(Heard(output[0], alive, counts))

        routers = [layer.get_submodule(self._router) for layer in self._layers]
        handles = [router.register_forward_hook(listen) for router in routers]
        try:
            yield heard
        finally:
            for handle in handles:
                handle.remove()

    def of_layers(self, heard: list[Heard], *, sequences: int) -> Tensor:
        """The loss of each layer and sequence [L, B]."""
        return torch.stack(
            [
                balance_loss(
                    of.logits.view(sequences, -1, of.logits.shape[-1]), per_token=self._per_token, alive=of.alive
                )
                for of in heard
            ]
        )

    def weighed(self, heard: list[Heard], *, sequences: int) -> Tensor:
        """The loss of each sequence [B], the mean over layers that are there, with its coefficient."""
        losses_LB = self.of_layers(heard, sequences=sequences)
        if heard[0].counts is None:
            return self.coefficient * losses_LB.mean(0)
        there_L = torch.stack([of.counts for of in heard if of.counts is not None])
        return self.coefficient * (there_L[:, None] * losses_LB).sum(0) / there_L.sum().clamp_min(1.0)


def balance_loss(logits_BSE: Tensor, *, per_token: int, alive: Tensor | None = None) -> Tensor:
    """The loss of one layer, [B] in fp32.

    Args:
        logits_BSE: of its router; those of experts that are masked away are as low as can be.
        per_token: K.
        alive: [E] above 0 for experts that are there; None: all are.
    """
    probabilities_BSE = logits_BSE.softmax(-1, dtype=torch.float32)
    chosen_BN = probabilities_BSE.topk(per_token, dim=-1).indices.flatten(1)
    ones_BN = torch.ones_like(chosen_BN, dtype=torch.float32)
    experts, length = logits_BSE.shape[-1], logits_BSE.shape[1]
    sent_BE = ones_BN.new_zeros(len(chosen_BN), experts).scatter_add_(1, chosen_BN, ones_BN) / length
    there = experts if alive is None else (alive > 0).sum()
    return there * (sent_BE * probabilities_BSE.mean(1)).sum(-1)
