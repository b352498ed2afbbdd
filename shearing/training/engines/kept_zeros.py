"""Training that keeps the zeros of a sparse model: what its stored masks drop is 0 again after every optimiser step.

The masks that were stored when the model was made sparse are what counts, not which weights happen to be 0: a kept
weight that passes through 0 goes on learning, and a dropped one stays dropped under weight decay, momentum, clipping
and any precision. They act on the memory that the optimiser updates (fp32 master weights under ZeRO, before they are
rounded and handed out), each process on the elements that it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from shearing.errors import ShearingError
from shearing.training.checkpoints.pieces import WEIGHT, Piece


class KeptZeros:
    """The dropped elements among those that a process holds.

    Args:
        pieces: what this process holds of the parameters; their weights are changed in place.
        shapes: of all parameters of the model.
        masks: parameter and bool mask of its shape, True where a weight is kept, one after the other; parameters
            without one are left alone.

    Raises:
        ShearingError: a mask is of no parameter, or of another shape.
    """

    def __init__(
        self, pieces: Iterable[Piece], *, shapes: Mapping[str, tuple[int, ...]], masks: Iterable[tuple[str, Tensor]]
    ) -> None:
        held = {piece.name: piece for piece in pieces}
        self._dropped: dict[str, tuple[Tensor, Tensor]] = {}
        for name, mask in masks:
            require_shape(name, mask=mask, shapes=shapes)
            if (piece := held.get(name)) is not None:
                weight = piece.values[WEIGHT]
                kept = mask.reshape(-1)[piece.start : piece.start + piece.numel]
                self._dropped[name] = (weight, ~kept.to(weight.device).view(weight.shape))

    @torch.no_grad()
    def enforce(self, *_: object) -> None:
        """Set the dropped elements to 0; arguments are those of an optimiser's step hook."""
        for weight, dropped in self._dropped.values():
            weight.masked_fill_(dropped, 0.0)

    def require(self) -> None:
        """Check that all dropped elements are 0; waits for the device.

        Raises:
            ShearingError: some are not; training with them must not be saved.
        """
        require_zero(self._dropped)


def require_shape(name: str, *, mask: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a mask is of a parameter of the model.

    Args:
        name: of the parameter.
        mask: that is said to be of it.
        shapes: of all parameters of the model.

    Raises:
        ShearingError: it is of none, or of another shape.
    """
    if shapes.get(name) != tuple(mask.shape):
        raise ShearingError(
            f"mask of {name}",
            value=tuple(mask.shape),
            allowed=f"shape {shapes[name]}" if name in shapes else "masks of the model's own parameters",
            mend="give the masks that were stored with this very model",
        )


def require_zero(held: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Check that dropped elements are 0; waits for the device.

    Args:
        held: parameter -> what is held of its weight, and which of that is dropped.

    Raises:
        ShearingError: some are not; training with them must not be saved.
    """
    if not held:
        return
    counts = torch.stack([((weight != 0) & dropped).sum() for weight, dropped in held.values()]).tolist()
    wrong = {name: int(count) for name, count in zip(held, counts, strict=True) if count}
    if wrong:
        name = max(wrong, key=lambda each: wrong[each])
        raise ShearingError(
            f"weights of {name}",
            value=f"{wrong[name]} dropped weights are not 0 (and in {len(wrong) - 1} more parameters)",
            allowed="0 wherever the stored mask drops a weight",
            mend="the last checkpoint is sound: start again from there; if it happens again, report it with the "
            "versions of torch and deepspeed",
        )
