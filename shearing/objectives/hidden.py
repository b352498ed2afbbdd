"""Activation matching: how far a student's residual stream is from that of the teacher it was made of.

A cut leaves the basis of the residual stream as it is, so each kept dimension is compared with the teacher's own,
without a projector, behind the teacher's layer that the student's layer was. Of token t, over matched layers l and
kept dimensions i:

    e_t = mean_l  sum_i (h_li - g_li)^2 / sum_i g_li^2        h: the student's stream, g: the teacher's

It is relative to the token's own stream, or the first tokens of a text, whose streams are hundreds of times longer than
others', would be nearly all of it.

Shapes: B sequences, S positions, D dimensions of the student, L matched layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shearing.models.anatomy import decoder_layers, head_weight
from shearing.models.correspondence import Correspondence
from shearing.objectives.chunked import sum_dtype


class HiddenMatching:
    """Residual streams behind the layers that a student and its teacher have in common.

    States are listened to while the two models run, so they are kept of matched layers alone, and of the teacher only
    the dimensions that the student has. It is no module: nothing of it is an engine's.

    Args:
        student: the model that is trained.
        teacher: the model that it was made of, as it was or trained on.
        correspondence: of the student to the teacher.
        layers: of the teacher, those that are compared; None: all.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        *,
        teacher: PreTrainedModel,
        correspondence: Correspondence,
        layers: Sequence[int] | None = None,
    ) -> None:
        pairs = [pair for pair in enumerate(correspondence.layers) if layers is None or pair[1] in layers]
        self._own, self._taught = [own for own, _ in pairs], [taught for _, taught in pairs]
        self._student, self._teacher, self._masks = student, teacher, correspondence.masks
        device = head_weight(student).device
        self._hidden = None if correspondence.hidden is None else correspondence.hidden.to(device)
        self._own_L = torch.tensor(self._own, dtype=torch.int64, device=device)

    @contextmanager
    def of_student(self) -> Iterator[list[Tensor]]:
        """Of the forward pass inside: [B, S, D] behind each matched layer, in the order of layers."""
        with _listening(self._student, layers=self._own, dimensions=None) as states:
            yield states

    @contextmanager
    def of_teacher(self) -> Iterator[list[Tensor]]:
        """As `of_student`, of the teacher's forward pass: the same layers and dimensions."""
        with _listening(self._teacher, layers=self._taught, dimensions=self._hidden) as states:
            yield states

    def errors(self, student: Sequence[Tensor], *, teacher: Sequence[Tensor]) -> Tensor:
        """e_t of each token, [B, S], in fp32 (fp64 for fp64 states), under the masks that act now.

        Args:
            student, teacher: what `of_student` and `of_teacher` heard of the same tokens, at least one layer.
        """
        masks = self._masks()
        inside_D = None if masks.hidden is None else masks.hidden.detach() > 0
        found = [_relative_error(own, taught, inside_D) for own, taught in zip(student, teacher, strict=True)]
        errors_LBS = torch.stack(found)
        if masks.mlp is None:
            return errors_LBS.mean(0)
        open_L = (masks.mlp.detach()[self._own_L] > 0).to(errors_LBS.dtype)
        return (errors_LBS * open_L[:, None, None]).sum(0) / open_L.sum().clamp_min(1.0)


def _relative_error(own_BSD: Tensor, taught_BSD: Tensor, inside_D: Tensor | None) -> Tensor:
    dtype = sum_dtype(own_BSD)
    taught_BSD = taught_BSD.to(dtype)
    squares = [(own_BSD.to(dtype) - taught_BSD).square(), taught_BSD.square()]
    if inside_D is not None:
        squares = [square_BSD * inside_D for square_BSD in squares]
    apart_BS, length_BS = (square_BSD.sum(-1) for square_BSD in squares)
    return apart_BS / length_BS.clamp_min(torch.finfo(dtype).tiny)


@contextmanager
def _listening(model: PreTrainedModel, *, layers: Sequence[int], dimensions: Tensor | None) -> Iterator[list[Tensor]]:
    """What these layers put out while the block runs; what a backward pass recomputes comes later, and is not heard."""
    states: list[Tensor] = []
    modules = decoder_layers(model)
    with ExitStack() as stack:
        for layer in layers:
            hook = modules[layer].register_forward_hook(partial(_keep, states, dimensions))
            stack.callback(hook.remove)
        yield states


def _keep(states: list[Tensor], dimensions: Tensor | None, _module: nn.Module, _arguments: Any, output: Any) -> None:
    state_BSD: Tensor = output if isinstance(output, Tensor) else output[0]
    states.append(state_BSD if dimensions is None else state_BSD.index_select(-1, dimensions))
