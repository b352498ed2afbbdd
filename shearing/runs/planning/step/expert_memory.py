"""What the experts of a layer keep for the backward pass: every token as often as it has experts.

Legend: d hidden, m units of an expert, E experts, k experts of a token.
"""

from __future__ import annotations

from shearing.models.shape import Shape

_FP32 = 4
_INDEX = 8


def units_per_token(shape: Shape) -> int:
    """Units of the MLP that a token is computed by: m, or those of its k experts."""
    return shape.intermediate_size * max(1, shape.num_experts_per_tok)


def saved_by_experts(shape: Shape, *, product_bytes: int, masked: bool) -> dict[str, int]:
    """Bytes per token that `families.experts.products` keeps, without the norm and the router's input.

    Args:
        shape: of a model with experts.
        product_bytes: of a number that a matrix product reads or writes.
        masked: masks are being learned.
    """
    each, units, width = shape.num_experts_per_tok, units_per_token(shape), each_width(shape)
    return {
        "router's probabilities": (_FP32 + (1 if masked else 0)) * shape.num_experts,
        "experts of each token, their weights and order": each * (3 * _INDEX + 2 * _FP32),
        "experts' input": product_bytes * width,
        "experts' products": product_bytes * 2 * units,
        "experts' activations": product_bytes * units,
        "experts' gated products": product_bytes * units * (2 if masked else 1),
        "experts' output": product_bytes * width,
    }


def each_width(shape: Shape) -> int:
    """Numbers that a token's experts read, or write, together: k d."""
    return shape.num_experts_per_tok * shape.hidden_size


def width_read(shape: Shape) -> int:
    """Numbers per token that the products put out that read what the MLP reads: the router's and the experts'."""
    return shape.num_experts + 2 * units_per_token(shape)


def balance_kept(shape: Shape, *, product_bytes: int) -> dict[str, int]:
    """Bytes per token that each layer's part in the load-balancing loss keeps; nothing without experts."""
    return (
        {"router's logits, and what the balance is of": (product_bytes + _FP32) * shape.num_experts}
        if (shape.num_experts)
        else {}
    )
