"""Gradients of the losses of rows for every matrix of a model, one place of it after the other, from the head down.

Rows go forward first, layer by layer, and what each layer read of each row stays on the host (`kept_bytes`); then
backward, each layer computed once more. Of the model's weights and of their gradients, no more than one place's are
needed at a time.

Shapes: B sequences of S tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shearing.data.documents import IGNORED_LABEL, Inputs
from shearing.models.anatomy import anatomy_of, decoder_layers, head_of, head_weight
from shearing.models.shape import Shape
from shearing.models.stored.paging.on_demand import weights_here
from shearing.models.stored.paging.passing import Call, embedded, layer_calls
from shearing.objectives.cross_entropy import causal_lm_loss
from shearing.pruning.calibration.walk import run_layer
from shearing.pruning.structured.importance.text_loss import labels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_TOKENS = 1024

LossOf = Callable[[int, Tensor, Tensor], Tensor]
"""From a row's number, its hidden states [1, S, D] after the final norm and the head [V, D]: its loss, a scalar."""

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
        head = head_of(model)
        with weights_here(head.weight):
            drawn = [
                self._draw(head.logits(hidden_CD).float().softmax(-1))
                for hidden_CD in hidden_BSD.flatten(0, 1).split(_CHUNK_TOKENS)
            ]
        labels_BS = torch.cat(drawn).view(batch.tokens.shape)
        left_out_BS = None if batch.documents is None else batch.documents.left_out
        return labels_BS if left_out_BS is None else labels_BS.masked_fill(left_out_BS, IGNORED_LABEL)

    def skip(self, model: PreTrainedModel, batch: Inputs) -> None:
        """Draw as often as for a batch that another process reads, so that what comes next is drawn as if read here."""
        weight_VD = head_weight(model)
        for tokens_C in batch.tokens.flatten().split(_CHUNK_TOKENS):
            self._draw(torch.ones(len(tokens_C), len(weight_VD), device=weight_VD.device))

    def _draw(self, probabilities_CV: Tensor) -> Tensor:
        if self._generator is None:
            self._generator = torch.Generator(probabilities_CV.device).manual_seed(self._seed)
        return torch.multinomial(probabilities_CV, 1, generator=self._generator)


def kept_bytes(source: Shape, *, tokens: float) -> float:
    """What `gradients_by_place` keeps on the host: of each token what every layer and the final norm read, and the
    gradient of the last place, in fp32.

    Args:
        source: sizes of the model.
        tokens: of all rows.
    """
    return 4.0 * (source.num_hidden_layers + 2) * source.hidden_size * tokens


@dataclass(frozen=True)
class Place:
    """Some weights of a model, and their gradients.

    Attributes:
        layer: of which they are; None: of none.
        parameters: the weights; they are there as long as the place is the last one that was asked for.
        of_rows: for each row, in order, the gradients of its loss by each of them; each is computed when it is asked
            for, once, and may be changed in place.
    """

    layer: int | None
    parameters: list[nn.Parameter]
    of_rows: Iterator[list[Tensor]]


class RowGradients:
    """Gradients of the summed cross-entropy of each row.

    Args:
        model: plain model, in evaluation mode.
        rows: of one sequence each.
        labels: which token each position has to predict.

    Attributes:
        counts: how many labels count in each row, as soon as its first gradient is there.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Inputs], *, labels: Labels = labels_of_text) -> None:
        self._model, self._rows, self._labels_of = model, rows, labels
        self._labels: dict[int, Tensor] = {}
        self.counts: list[int] = []

    def places(self) -> Iterator[Place]:
        """Every matrix of the model once; see `gradients_by_place`."""
        return gradients_by_place(self._model, self._rows, loss_of=self._loss)

    def _loss(self, row: int, hidden_BSD: Tensor, head_VD: Tensor) -> Tensor:
        if row not in self._labels:  # where the head is the embedding, a row's loss is computed twice
            self._labels[row] = self._labels_of(self._model, hidden_BSD.detach(), self._rows[row])
            self.counts.append(int((self._labels[row] != IGNORED_LABEL).sum()))
        head = head_of(self._model).with_weight(head_VD)
        loss, _ = causal_lm_loss(hidden_BSD, head, self._labels[row], chunk_tokens=_CHUNK_TOKENS)
        return loss


def matrices_of(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are matrices, or stacks of experts' matrices; a tied embedding once."""
    return [parameter for parameter in module.parameters() if parameter.ndim > 1]


def gradients_by_place(
    model: PreTrainedModel,
    rows: Sequence[Inputs],
    *,
    loss_of: LossOf,
    parameters: Callable[[nn.Module], list[nn.Parameter]] = matrices_of,
    outside: bool = True,
) -> Iterator[Place]:
    """Gradients of the loss of each row by the head, by layers from the last to the first, and by the embedding.

    Where the head is the embedding it comes with that. Nothing is left in the model. A place is done with when the next
    is asked for; what has not been asked for of its rows is computed then.

    Args:
        model: plain model, in evaluation mode, whole or with weights that come on demand.
        rows: tokens and documents.
        loss_of: the loss of a row.
        parameters: whose gradients are wanted of a layer.
        outside: whether those of embedding and head are wanted too.
    """
    passes = _Passes(model, rows, loss_of=loss_of)
    embedding, head = passes.embedding, passes.head
    own = [head] if outside and head is not embedding else []
    for place in [
        Place(None, own, passes.through_the_head(with_head=bool(own))),
        *(passes.layer(index, parameters) for index in reversed(range(len(passes.layers)))),
        *([Place(None, [embedding], passes.through_the_embedding())] if outside else []),
    ]:
        module = [] if place.layer is None else [passes.layers[place.layer]]
        with weights_here(*module, *place.parameters), differentiable(place.parameters):
            if place.parameters:
                yield place
            for _ in place.of_rows:
                pass


class _Passes:
    """All rows on their way forward and back."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Inputs], *, loss_of: LossOf) -> None:
        self._model, self._rows, self._loss_of = model, rows, loss_of
        self._device = head_weight(model).device
        family = anatomy_of(model)
        self._norm = model.get_submodule(family.final_norm.name)
        self.layers = list(decoder_layers(model))
        named = dict(model.named_parameters(remove_duplicate=False))
        self.embedding, self.head = (named[parameter.name] for parameter in family.embeddings)
        self._calls: list[list[Call]] = []
        self._reads: list[list[Tensor]] = []  # by layer, of each row; last what the final norm reads
        self._upstream: list[Tensor] = []  # of each row, its loss by what the place before has written
        self._forward()

    @torch.no_grad()
    def _forward(self) -> None:
        streams = []
        for row in self._rows:
            stream, calls = layer_calls(self._model, **row.keywords())
            streams.append(stream.cpu())
            self._calls.append(calls)
        self._reads.append(streams)
        for index in range(len(self.layers)):
            self._reads.append([self._run(index, row).cpu() for row in range(len(self._rows))])

    def _run(self, index: int, row: int, stream: Tensor | None = None) -> Tensor:
        stream = self._read(index, row) if stream is None else stream
        return run_layer(self.layers[index], self.layers[index], stream, self._calls[row][index], places=())[1]

    def _read(self, index: int, row: int) -> Tensor:
        return self._reads[index][row].to(self._device)

    def through_the_head(self, *, with_head: bool) -> Iterator[list[Tensor]]:
        for row in range(len(self._rows)):
            stream = self._read(len(self.layers), row).detach().requires_grad_(True)
            with weights_here(self.head):
                # By itself: where it is the embedding too, the whole graph would lead to it.
                head = self.head.detach().requires_grad_(with_head)
                with torch.enable_grad():
                    loss = self._loss_of(row, self._norm(stream), head)
                upstream, *of_head = torch.autograd.grad(loss, [stream, head] if with_head else [stream])
            self._upstream.append(upstream.cpu())
            yield of_head

    def layer(self, index: int, parameters: Callable[[nn.Module], list[nn.Parameter]]) -> Place:
        own = parameters(self.layers[index])
        return Place(index, own, self._through_layer(index, own))

    def _through_layer(self, index: int, own: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
        for row in range(len(self._rows)):
            below = self._read(index, row).detach().requires_grad_(True)
            with torch.enable_grad():
                above = self._run(index, row, below)
            gradients = torch.autograd.grad(above, [below, *own], self._upstream[row].to(self._device))
            self._upstream[row] = gradients[0].cpu()
            yield list(gradients[1:])

    def through_the_embedding(self) -> Iterator[list[Tensor]]:
        for row, inputs in enumerate(self._rows):
            with torch.enable_grad():
                stream, _ = embedded(self._model, **inputs.keywords())
            (gradient,) = torch.autograd.grad(stream, [self.embedding], self._upstream[row].to(self._device))
            if self.head is self.embedding:
                gradient = gradient + self._of_tied_head(row)
            yield [gradient]

    def _of_tied_head(self, row: int) -> Tensor:
        head = self.head.detach().requires_grad_(True)
        with torch.no_grad():
            hidden = self._norm(self._read(len(self.layers), row))
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._loss_of(row, hidden, head), [head])
        return gradient


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
