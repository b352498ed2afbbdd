"""Experts computed together: pairs of a token and an expert are sorted by expert, and each stack is multiplied once.

transformers' grouped products take no part in autocast: fp32 weights would be multiplied in fp32 there. Its `eager`
loop asks the device which experts have tokens, and gives every one of them a gradient of all.

Legend: T tokens, K experts of a token, P = T * K pairs, E experts, M units of an expert, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
    product = _products(expert_P, experts=experts, dtype=dtype, widths=(*gate_up.shape[1:], *down.shape[1:]))
    gate_PM, up_PM = product(x_TD.to(dtype)[order_P // each], gate_up, None).chunk(2, -1)
    inner_PM = activation(gate_PM) * up_PM
    out_PD = product(inner_PM, down, units_EM)
    if listener is not None:
        listener(inner_PM, out_PD, order_P)
    # In the order of the tokens again, where they are added up in a fixed order.
    out_PD = out_PD[order_P.argsort()] * weights_TK.reshape(-1, 1)
    return out_PD.view(*index_TK.shape, -1).sum(1).to(dtype)


_Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Of sorted pairs' X [P, I], a stack [E, O, I], and what scales each expert's columns of it [E, I] or None: [P, O]."""


def _products(expert_P: Tensor, *, experts: int, dtype: torch.dtype, widths: tuple[int, ...]) -> _Product:
    """The product of each pair with the transposed matrix of its expert, of pairs that are sorted by expert."""
    ends_E = _ends(expert_P, experts=experts)
    if _has_kernel(expert_P.device, dtype) and all(width % _ALIGNED == 0 for width in widths):
        offsets = ends_E.to(torch.int32)

        def together(x_PI: Tensor, stack_EOI: Tensor, columns_EI: Tensor | None) -> Tensor:
            if columns_EI is not None:
                x_PI = _ScaledUnits.apply(x_PI, columns_EI, expert_P)  # type: ignore[no-untyped-call]
            return torch._grouped_mm(x_PI, stack_EOI.to(dtype).mT, offs=offsets)  # noqa: SLF001 - no older name

        return together
    counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    return lambda x_PI, stack_EOI, columns_EI: _OneByOne.apply(x_PI, stack_EOI, columns_EI, counts)  # type: ignore[no-untyped-call]


class _ScaledUnits(torch.autograd.Function):
    """Each pair's units times their expert's mask, keeping no copy of the mask by pair."""

    @staticmethod
    def forward(ctx: Any, inner_PM: Tensor, units_EM: Tensor, expert_P: Tensor) -> Tensor:
        ctx.save_for_backward(inner_PM, units_EM, expert_P)
        return units_EM.to(inner_PM.dtype)[expert_P].mul_(inner_PM)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inner_PM, units_EM, expert_P = ctx.saved_tensors
        grad_PM = grad_outputs[0]
        grad_inner = grad_units = None
        if ctx.needs_input_grad[0]:
            grad_inner = units_EM.to(grad_PM.dtype)[expert_P].mul_(grad_PM)
        if ctx.needs_input_grad[1]:
            of_pairs_PM = (grad_PM * inner_PM).to(units_EM.dtype)
            counts_E = _ends(expert_P, experts=len(units_EM)).diff(prepend=expert_P.new_zeros(1))
            # In a fixed order, which sums by index do not have on a GPU.
            grad_units = torch.segment_reduce(of_pairs_PM, "sum", lengths=counts_E, axis=0, unsafe=True)
        return grad_inner, grad_units, None


class _OneByOne(torch.autograd.Function):
    """The products expert by expert, each put where it belongs in the whole.

    Autograd would put outputs, and the gradients of inputs and of the stack, together once more from parts. As in
    `shearing.models.masked`, columns scale an expert's matrix where it has more pairs than rows, and else what it
    reads; their gradients come out of the product that those of what was scaled are made of.
    """

    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, stack_EOI: Tensor, columns_EI: Tensor | None, counts: list[int]) -> Tensor:
        y_PO = x_PI.new_empty(len(x_PI), stack_EOI.shape[1])
        with torch.autocast(x_PI.device.type, enabled=False):
            parts = zip(stack_EOI, _rows_of(columns_EI, stack_EOI), x_PI.split(counts), y_PO.split(counts), strict=True)
            for matrix_OI, columns_I, x_NI, y_NO in parts:
                fold = columns_I is not None and len(x_NI) > len(matrix_OI)
                scaled_OI = matrix_OI * columns_I if fold else matrix_OI
                read_NI = x_NI if fold or columns_I is None else x_NI * columns_I.to(x_NI.dtype)
                # Not as `out`: selective checkpointing keeps products, and refuses what is written to afterwards.
                y_NO.copy_(torch.mm(read_NI, scaled_OI.to(x_NI.dtype).T))
        ctx.save_for_backward(x_PI, stack_EOI, columns_EI)
        ctx.counts = counts
        return y_PO

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_PI, stack_EOI, columns_EI = ctx.saved_tensors
        grad_PO = grad_outputs[0].to(x_PI.dtype)
        need_x, need_stack, need_columns, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x_PI) if need_x else None
        grad_stack = torch.empty_like(stack_EOI) if need_stack else None
        grad_columns = torch.empty_like(columns_EI) if need_columns else None
        begin = 0
        for expert, (count, columns_I) in enumerate(zip(ctx.counts, _rows_of(columns_EI, stack_EOI), strict=True)):
            pairs = slice(begin, begin := begin + count)
            x_NI, grad_NO, matrix_OI = x_PI[pairs], grad_PO[pairs], stack_EOI[expert]
            into_x = None if grad_x is None else grad_x[pairs]
            into = None if grad_stack is None else grad_stack[expert]
            of_columns_I = None if grad_columns is None else grad_columns[expert]
            if columns_I is None or count > len(matrix_OI):
                _by_matrix(x_NI, grad_NO, matrix_OI, columns_I, into_x=into_x, into=into, of_columns_I=of_columns_I)
            else:
                _by_pairs(x_NI, grad_NO, matrix_OI, columns_I, into_x=into_x, into=into, of_columns_I=of_columns_I)
        return grad_x, grad_stack, grad_columns, None


def _by_matrix(
    x_NI: Tensor,
    grad_NO: Tensor,
    matrix_OI: Tensor,
    columns_I: Tensor | None,
    *,
    into_x: Tensor | None,
    into: Tensor | None,
    of_columns_I: Tensor | None,
) -> None:
    """Gradients of an expert's product whose matrix is scaled, or nothing is: of the pairs, the matrix, its columns."""
    if into_x is not None:
        scaled_OI = matrix_OI if columns_I is None else matrix_OI * columns_I
        torch.mm(grad_NO, scaled_OI.to(x_NI.dtype), out=into_x)
    if into is None and of_columns_I is None:
        return
    outer_OI = torch.mm(grad_NO.T, x_NI, out=into if into is not None and into.dtype == x_NI.dtype else None)
    if of_columns_I is not None:
        # In the masks' precision, which is fp32 also where the products are bf16.
        of_columns_I.copy_((outer_OI.to(of_columns_I.dtype) * matrix_OI).sum(0))
    if into is not None and columns_I is not None:
        torch.mul(outer_OI, columns_I, out=into)
    elif into is not None and into is not outer_OI:
        into.copy_(outer_OI)


def _by_pairs(
    x_NI: Tensor,
    grad_NO: Tensor,
    matrix_OI: Tensor,
    columns_I: Tensor,
    *,
    into_x: Tensor | None,
    into: Tensor | None,
    of_columns_I: Tensor | None,
) -> None:
    """As `_by_matrix`, where what is read is scaled instead: nothing of the matrix's size is made but its gradient."""
    scale_I = columns_I.to(x_NI.dtype)
    if into_x is not None or of_columns_I is not None:
        of_read_NI = torch.mm(grad_NO, matrix_OI.to(x_NI.dtype), out=into_x)
        if of_columns_I is not None:
            # In the masks' precision, which is fp32 also where the products are bf16.
            of_columns_I.copy_((of_read_NI.to(of_columns_I.dtype) * x_NI).sum(0))
        if into_x is not None:
            into_x.mul_(scale_I)
    if into is not None and into.dtype == x_NI.dtype:
        torch.mm(grad_NO.T, x_NI * scale_I, out=into)
    elif into is not None:
        into.copy_(torch.mm(grad_NO.T, x_NI * scale_I))


def _rows_of(columns_EI: Tensor | None, stack_EOI: Tensor) -> Sequence[Tensor | None]:
    return [None] * len(stack_EOI) if columns_EI is None else columns_EI.unbind(0)


def _ends(expert_P: Tensor, *, experts: int) -> Tensor:
    """Where the pairs of each expert end, of pairs that are sorted by expert."""
    return torch.searchsorted(expert_P, torch.arange(experts, device=expert_P.device), right=True)


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a product for all experts that need not know on the host how many tokens each has."""
    return device.type == "cuda" and dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm") and _is_ampere_or_newer()


@functools.cache
def _is_ampere_or_newer() -> bool:
    # Releases before 2.9 have it for Hopper alone.
    least = (8, 0) if hasattr(F, "grouped_mm") else (9, 0)
    return torch.version.cuda is not None and torch.cuda.get_device_capability() >= least
