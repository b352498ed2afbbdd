"""The basis of principal components of what norms read, tokens weighted by their inverse mean square.

Without the weights the few tokens whose stream is a thousand times the others' would be the first components.

Legend: B sequences, S positions, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shearing.data.documents import Inputs
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.stored.paging.passing import last_states
from shearing.processes.processes import Processes
from shearing.pruning.rotation.basis import Basis, weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def principal_basis(
    model: PreTrainedModel,
    batches: Sequence[Inputs],
    *,
    advance: Callable[[int], None] = lambda _: None,
    processes: Processes | None = None,
) -> Basis:
    """Eigenvectors of Σ x xᵀ / ms(x) over the inputs x of all norms and all tokens, by falling eigenvalue.

    Args:
        model: on any device; left as it is. Its weights may come on demand.
        batches: tokens [B, S], on the model's device.
        advance: called with the number of batches of all processes that have just been read.
        processes: those that share out the batches; all have to call this, and all get the result.
    """
    processes = processes or Processes()
    family, device = anatomy_of(model), next(model.parameters()).device
    d = weight_of(model, family.embedding).shape[1]
    total = torch.zeros(d, d, dtype=torch.float64, device=device)
    final = torch.zeros_like(total)
    tokens = torch.zeros((), dtype=torch.float64, device=device)

    def adds_to(sums: Tensor, *, counts: bool = False) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x_Td = arguments[0].reshape(-1, d).float()
            normed_Td = x_Td * x_Td.square().mean(dim=1, keepdim=True).clamp_min(1e-30).rsqrt()
            sums.add_((normed_Td.T @ normed_Td).double())
            if counts:
                tokens.add_(len(normed_Td))

        return add

    was_training = model.training
    model.eval()
    last = model.get_submodule(family.final_norm.name)
    places = [layer.get_submodule(each.entry) for layer in decoder_layers(model) for each in family.sublayers.values()]
    with ExitStack() as listening:
        for place in places:
            listening.callback(place.register_forward_pre_hook(adds_to(total)).remove)
        listening.callback(last.register_forward_pre_hook(adds_to(final, counts=True)).remove)
        own = batches[processes.rank :: processes.size]
        for number, _ in enumerate(last_states(model, (batch.keywords() for batch in own))):
            advance(min(processes.size, len(batches) - number * processes.size))
    model.train(was_training)
    total += final
    for sums in (total, final, tokens):
        processes.sum(sums)
    # On the CPU, where the same sums have the same vectors on every machine of a run.
    vectors = torch.linalg.eigh(total.cpu()).eigenvectors.flip(1)
    largest = vectors.abs().argmax(dim=0)
    signs = torch.sign(vectors[largest, torch.arange(d)])
    return Basis(rotation=vectors * signs, moment=(final / tokens).cpu())
