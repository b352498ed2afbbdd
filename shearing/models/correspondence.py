"""Where the residual stream of a model that was made of another one can be compared with that one's.

A cut renumbers layers and dimensions and leaves the basis of the residual stream as it is: what is kept of it is the
source's, dimension by dimension, without a projection.

Legend: L' layers and d' dimensions of the model, L layers and d dimensions of its source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Self

from shearing.models.cutting import Selection
from shearing.models.masked import MaskedModel, Masks


@dataclass(frozen=True, kw_only=True)
class Correspondence:
    """A model's layers and dimensions, as those of its source.

    Attributes:
        layers: [L'], of each layer the source's layer behind which the residual stream is the same stream: that of its
            MLP.
        hidden: int64 [d'], the source's dimension of each; None: all, in their order.
        masks: those that act now: what they close does not count.
    """

    layers: tuple[int, ...]
    hidden: Tensor | None = None
    masks: Callable[[], Masks] = Masks

    @classmethod
    def of_source(cls, *, num_layers: int) -> Self:
        """The source itself, whatever was trained or zeroed in it.

        Args:
            num_layers: L.
        """
        return cls(layers=tuple(range(num_layers)))

    @classmethod
    def of_masked(cls, model: MaskedModel) -> Self:
        """The source under masks: all there is, and what is open at the time counts."""
        return cls(layers=tuple(range(model.model.config.num_hidden_layers)), masks=lambda: model.masks)

    @classmethod
    def of_cut(cls, selection: Selection) -> Self:
        """The model that is left of a selection."""
        return cls(layers=tuple(mlp for _, mlp in selection.layers), hidden=selection.hidden)
