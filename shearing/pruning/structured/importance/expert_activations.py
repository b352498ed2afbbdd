"""How much each expert, and each of its units, writes on calibration text.

Legend: B sequences of S tokens, T = B * S, K experts of a token, P = T * K pairs of a token and an expert, E experts, M
units of an expert, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shearing.models.families.experts.products import experts_output


class ExpertRecorder:
    """Listens to the experts of one layer, until `remove`.

    A pair's token counts by the weight w that its router gives the expert: of a unit |w h|, of an expert |w y|, h what
    the unit has and y what the expert puts out. The mean over all positions of a sequence, those that another expert
    has among them, is how often an expert is chosen times what it writes then.

    Args:
        experts: module whose forward pass this stands in for.
        sequences: B, of the pass that is under way.
        add: is given `experts` [E] and `intermediate` [E, M], sums over sequences of squared means.
    """

    def __init__(self, experts: nn.Module, *, sequences: Callable[[], int], add: Callable[[str, Tensor], None]) -> None:
        self._experts, self._sequences, self._add = experts, sequences, add
        experts.forward = self._forward

    def remove(self) -> None:
        """Puts the module's own forward pass back."""
        del self._experts.forward

    def _forward(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        gate_up, down, activation = self._experts.gate_up_proj, self._experts.down_proj, self._experts.act_fn
        assert isinstance(gate_up, Tensor)
        assert isinstance(down, Tensor)
        assert callable(activation)
        sequences, experts = self._sequences(), gate_up.shape[0]
        length = x_TD.shape[0] // sequences

        def record(inner_PM: Tensor, out_PD: Tensor, order_P: Tensor) -> None:
            token_P = order_P // index_TK.shape[-1]
            weight_P = weights_TK.flatten()[order_P].float()
            row_P = token_P // length * experts + index_TK.flatten()[order_P]
            by_row = row_P.argsort(stable=True)
            counts = torch.bincount(row_P, minlength=sequences * experts)
            for name, values in (
                ("experts", (out_PD.float().norm(dim=-1) * weight_P)[:, None]),
                ("intermediate", inner_PM.float().abs() * weight_P[:, None]),
            ):
                sums = torch.segment_reduce(values[by_row], "sum", lengths=counts, axis=0, unsafe=True)
                means_BE = (sums / length).view(sequences, experts, -1)
                self._add(name, means_BE.square().sum(0).squeeze(-1))

        return experts_output(
            x_TD, index_TK, weights_TK, gate_up=gate_up, down=down, activation=activation, listener=record
        )
