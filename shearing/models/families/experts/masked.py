"""Experts under masks: an expert that is masked away is not chosen, one that is partly there writes in part.

What is routed is what is there: the softmax runs over experts whose mask is above 0, and a token's experts are the best
of those. Their masks scale what they write and not how they are weighed, as a router has no bias that a mask could be
folded into. So the cut is exact: the rows of the router go, and z is folded into the columns of what writes.

Legend: T tokens, K experts of a token, E experts, M units of an expert, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shearing.models.families.experts.products import experts_output


class MaskedRouter(nn.Module):
    """A router some of whose experts are masked away; shares its weight [E, D] with the original.

    `alive` [E] is above 0 for those that can be chosen; None: all can. `counts`, a scalar tensor, is 0 where the whole
    layer is masked away; None: it is there.
    """

    alive: Tensor | None
    counts: Tensor | None

    def __init__(self, router: nn.Module, *, normalises: bool, weights_in_fp32: bool) -> None:
        super().__init__()
        weight, per_token = router.weight, router.top_k
        assert isinstance(weight, nn.Parameter)
        assert isinstance(per_token, int)
        self.weight = weight
        self._per_token = per_token
        self._normalises, self._weights_in_fp32 = normalises, weights_in_fp32
        self.alive = self.counts = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], weights [T, K] and indices [T, K] of each token's experts."""
        logits_TE = F.linear(x.reshape(-1, x.shape[-1]), self.weight)
        if self.alive is not None:
            # Not minus infinity: where no expert is left, all weigh the same, and none writes anything.
            logits_TE = logits_TE.masked_fill(self.alive <= 0, torch.finfo(logits_TE.dtype).min)
        weights_TK, index_TK = logits_TE.softmax(-1, dtype=torch.float32).topk(self._per_token, dim=-1)
        if self._normalises:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK if self._weights_in_fp32 else weights_TK.to(logits_TE.dtype), index_TK


class MaskedExperts(nn.Module):
    """Experts under masks; shares their stacks with the original.

    `columns` [E, M] scales units, `experts` [E] what an expert writes, `rows` [D] what all of them write; None leaves
    things as they are.
    """

    columns: Tensor | None
    rows: Tensor | None
    experts: Tensor | None

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        gate_up, down = experts.gate_up_proj, experts.down_proj
        assert isinstance(gate_up, nn.Parameter)
        assert isinstance(down, nn.Parameter)
        self.gate_up_proj, self.down_proj = gate_up, down
        self.act_fn = experts.act_fn
        self.columns = self.rows = self.experts = None

    def forward(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """What the experts of each token write: [T, D]."""
        activation = self.act_fn
        assert callable(activation)
        if self.experts is not None:
            weights_TK = weights_TK * self.experts.to(weights_TK.dtype)[index_TK]
        out_TD = experts_output(
            x_TD,
            index_TK,
            weights_TK,
            gate_up=self.gate_up_proj,
            down=self.down_proj,
            activation=activation,
            units_EM=self.columns,
        )
        return out_TD if self.rows is None else out_TD * self.rows.to(out_TD.dtype)
