"""Gradients of a loss for every matrix of a model, with one layer's beside the caller's sums at a time.

Shapes: B sequences of S tokens, N = B * S, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shearing.data.documents import IGNORED_LABEL, Inputs
from shearing.models.anatomy import anatomy_of, backbone, decoder_layers, head_of
from shearing.objectives.cross_entropy import causal_lm_loss
from shearing.pruning.structured.importance.text_loss import labels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_TOKENS = 1024

Labels = Callable[["PreTrainedModel", Tensor, Inputs], Tensor]
"""From a model, its hidden states [B, S, D] after the final norm and what it read, the labels [B, S];
`IGNORED_LABEL` where none counts."""


def labels_of_text(_model: PreTrainedModel, _hidden_BSD: Tensor, batch: Inputs) -> Tensor:
    """The tokens that follow; not those of other documents, and none for the last position of a row."""
    return F.pad(labels_of(batch), (0, 1), value=IGNORED_LABEL)


class LabelsOfModel:
    """Tokens drawn from the model's own prediction at every position whose next token counts in the text.

    Args:
        seed: of the draws.
    """

    def __init__(self, *, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, hidden_BSD: Tensor, batch: Inputs) -> Tensor:
        """See `Labels`."""
        if self._generator is None:
            self._generator = torch.Generator(hidden_BSD.device).manual_seed(self._seed)
        head = head_of(model)
        drawn = [
            torch.multinomial(head.logits(hidden_CD).float().softmax(-1), 1, generator=self._generator)
            for hidden_CD in hidden_BSD.flatten(0, 1).split(_CHUNK_TOKENS)
        ]
        labels_BS = torch.cat(drawn).view(batch.tokens.shape)
        left_out_BS = None if batch.documents is None else batch.documents.left_out
        return labels_BS if left_out_BS is None else labels_BS.masked_fill(left_out_BS, IGNORED_LABEL)


@contextmanager
def matrix_gradients(
    model: PreTrainedModel, batch: Inputs, *, labels: Labels = labels_of_text
) -> Iterator[tuple[int, Iterator[tuple[nn.Parameter, Tensor]]]]:
    """Gradients of the summed cross-entropy of a batch, from the head down.

    Layer by layer: when a layer's gradients are handed over, those of the layer above need not be there any more.
    Nothing is left in the model.

    Args:
        model: plain model, in evaluation mode.
        batch: tokens and documents.
        labels: which token each position has to predict.

    Returns:
        In a context: how many labels count; and each matrix of the model with its gradient, once.
    """
    family = anatomy_of(model)
    streams: list[Tensor] = []

    def record(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        streams.append(arguments[0])

    places = [*decoder_layers(model), model.get_submodule(family.final_norm.name)]
    with differentiable(matrices_of(model)):
        handles = [place.register_forward_pre_hook(record) for place in places]
        try:
            with torch.enable_grad():
                hidden_BSD = backbone(model)(**batch.keywords()).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        labels_BS = labels(model, hidden_BSD.detach(), batch)
        # By itself: where it is the embedding too, the whole graph would lead to it.
        whole = head_of(model)
        head = whole.weight.detach().requires_grad_(True)
        with torch.enable_grad():
            loss, _ = causal_lm_loss(hidden_BSD, whole.with_weight(head), labels_BS, chunk_tokens=_CHUNK_TOKENS)
        del hidden_BSD
        gradients = _from_the_head_down(model, loss, streams, head=head)
        yield int((labels_BS != IGNORED_LABEL).sum()), gradients


def matrices_of(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are matrices; a tied embedding once."""
    return [parameter for parameter in module.parameters() if parameter.ndim == 2]


def _from_the_head_down(
    model: PreTrainedModel, loss: Tensor, streams: list[Tensor], *, head: Tensor
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    outer = dict(model.named_parameters(remove_duplicate=False))
    embedding, head_matrix = (outer[parameter.name] for parameter in anatomy_of(model).embeddings)
    above = streams.pop()
    grad_above, grad_head = torch.autograd.grad(loss, [above, head])
    if head_matrix is not embedding:
        yield head_matrix, grad_head
    for layer in reversed(decoder_layers(model)):
        below = streams.pop()
        matrices = matrices_of(layer)
        grad_above, *gradients = torch.autograd.grad(above, [below, *matrices], grad_outputs=grad_above)
        above = below
        yield from zip(matrices, gradients, strict=True)
        del gradients
    (grad_embedding,) = torch.autograd.grad(above, [embedding], grad_outputs=grad_above)
    yield embedding, grad_embedding + grad_head if head_matrix is embedding else grad_embedding


@contextmanager
def differentiable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters require gradients while the context lasts, also those that were frozen."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
