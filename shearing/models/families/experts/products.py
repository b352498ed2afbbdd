"""Experts computed together: pairs of a token and an expert are sorted by expert, and each stack is multiplied once.

transformers' grouped products take no part in autocast: fp32 weights would be multiplied in fp32 there. Its `eager`
loop asks the device which experts have tokens, and gives every one of them a gradient of all.

Legend: T tokens, K experts of a token, P = T * K pairs, E experts, M units of an expert, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "grouped_under_autocast"
"""What transformers calls this way of computing experts."""

_ALIGNED = 8
"""Numbers of 16 bits that the kernel for all experts at once reads together."""


def compute_experts_under_autocast(model: PreTrainedModel) -> None:
    """Makes a model that has experts compute them as here, in place."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(IMPLEMENTATION, _of_module)
    model.set_experts_implementation(IMPLEMENTATION)


def _of_module(module: nn.Module, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    gate_up, down, activation = module.gate_up_proj, module.down_proj, module.act_fn
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    assert callable(activation)
    return experts_output(x_TD, index_TK, weights_TK, gate_up=gate_up, down=down, activation=activation)


def experts_output(
    x_TD: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    *,
    gate_up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor],
    units_EM: Tensor | None = None,
    listener: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """What the experts of each token put out, added up by their weights.

    Args:
        x_TD: what they read.
        index_TK, weights_TK: experts of each token, and their weights.
        gate_up: [E, 2 M, D].
        down: [E, D, M].
        activation: of the gates.
        units_EM: scales each expert's units; None: nothing does.
        listener: is told of the pairs, sorted by expert: what their units have [P, M], what their experts put out
            [P, D], and which of the pairs, token after token, each is [P].

    Returns:
        [T, D] in the dtype of `x_TD`, or autocast's.
    """
    dtype = x_TD.dtype
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
    experts, each = gate_up.shape[0], index_TK.shape[-1]
    expert_P, order_P = index_TK.flatten().sort(stable=True)
    product = _products(_ends(expert_P, experts=experts), dtype=dtype, widths=(*gate_up.shape[1:], *down.shape[1:]))
    gate_PM, up_PM = product(x_TD.to(dtype)[order_P // each], gate_up).chunk(2, -1)
    inner_PM = activation(gate_PM) * up_PM
    if units_EM is not None:
        inner_PM = _ScaledUnits.apply(inner_PM, units_EM, expert_P)  # type: ignore[no-untyped-call]
    out_PD = product(inner_PM, down)
    if listener is not None:
        listener(inner_PM, out_PD, order_P)
    # In the order of the tokens again, where they are added up in a fixed order.
    out_PD = out_PD[order_P.argsort()] * weights_TK.reshape(-1, 1)
    return out_PD.view(*index_TK.shape, -1).sum(1).to(dtype)


class _ScaledUnits(torch.autograd.Function):
    """Each pair's units times their expert's mask, keeping no copy of the mask by pair."""

    @staticmethod
    def forward(ctx: Any, inner_PM: Tensor, units_EM: Tensor, expert_P: Tensor) -> Tensor:
        ctx.save_for_backward(inner_PM, units_EM, expert_P)
        return inner_PM * units_EM.to(inner_PM.dtype)[expert_P]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inner_PM, units_EM, expert_P = ctx.saved_tensors
        grad_PM = grad_outputs[0]
        grad_inner = grad_units = None
        if ctx.needs_input_grad[0]:
            grad_inner = grad_PM * units_EM.to(grad_PM.dtype)[expert_P]
        if ctx.needs_input_grad[1]:
            of_pairs_PM = (grad_PM * inner_PM).to(units_EM.dtype)
            counts_E = _ends(expert_P, experts=len(units_EM)).diff(prepend=expert_P.new_zeros(1))
            # In a fixed order, which sums by index do not have on a GPU.
            grad_units = torch.segment_reduce(of_pairs_PM, "sum", lengths=counts_E, axis=0, unsafe=True)
        return grad_inner, grad_units, None


def _ends(expert_P: Tensor, *, experts: int) -> Tensor:
    """Where the pairs of each expert end, of pairs that are sorted by expert."""
    return torch.searchsorted(expert_P, torch.arange(experts, device=expert_P.device), right=True)


def _products(ends_E: Tensor, *, dtype: torch.dtype, widths: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    """X [P, I] of sorted pairs times the transposed matrix of each one's expert, of a stack [E, O, I]."""
    if _has_kernel(ends_E.device, dtype) and all(width % _ALIGNED == 0 for width in widths):
        offsets = ends_E.to(torch.int32)
        return lambda x, stack: torch._grouped_mm(x, stack.to(dtype).mT, offs=offsets)  # noqa: SLF001 - no older name
    counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()

    def one_by_one(x: Tensor, stack: Tensor) -> Tensor:
        pairs = zip(x.split(counts), stack.unbind(0), strict=True)
        return torch.cat([F.linear(of_expert.to(dtype), matrix.to(dtype)) for of_expert, matrix in pairs])

    return one_by_one


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a product for all experts that need not know on the host how many tokens each has."""
    return device.type == "cuda" and dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm") and _is_ampere_or_newer()


@functools.cache
def _is_ampere_or_newer() -> bool:
    # Releases before 2.9 have it for Hopper alone.
    least = (8, 0) if hasattr(F, "grouped_mm") else (9, 0)
    return torch.version.cuda is not None and torch.cuda.get_device_capability() >= least
