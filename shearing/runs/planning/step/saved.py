"""What a layer keeps for its backward pass, in bytes per token, every term a tensor one can name.

Legend: d hidden, m intermediate, H query heads, K KV groups, S positions of a sequence.
"""

from __future__ import annotations

from shearing.models.families.axes import count
from shearing.models.families.norms import Norm
from shearing.models.shape import Shape
from shearing.runs.planning.memory import BF16, FP32, Workload
from shearing.runs.planning.step.expert_memory import balance_kept, each_width, saved_by_experts, width_read


def saved_by_layer(shape: Shape, *, workload: Workload, weight_bytes: int) -> dict[str, int]:
    """Bytes per token that a decoder layer keeps for its backward pass when nothing is recomputed.

    Args:
        shape: the model's.
        workload: what a step computes.
        weight_bytes: of a weight, and so of a number in the residual stream: 4 under autocast.

    Returns:
        Name of each tensor -> its bytes per token.
    """
    attention = _saved_by_attention(shape, workload=workload, weight_bytes=weight_bytes)
    saved = attention | saved_by_mlp(shape, workload=workload, weight_bytes=weight_bytes)
    before = shape.family.mlp.before
    if shape.family.parallel and before is not None and before.kind.centred:
        del saved[f"{before.name}'s input"]  # the same tensor that the attention's norm reads
    return saved


def _saved_by_attention(shape: Shape, *, workload: Workload, weight_bytes: int) -> dict[str, int]:
    product, units = workload.product_bytes, shape.units()
    query, kv = units["query_heads"], units["kv_groups"]
    saved = _saved_by_norms(shape, "attention", workload=workload, weight_bytes=weight_bytes)
    # Without a fused kernel, keys and values are repeated for every query head.
    attended = query if workload.eager_attention else kv
    # Of a fused product the values are a view, which keeps all of it; queries and keys are rotated, and so copies that
    # lie head by head: so does what attention puts out, and its write reads a copy.
    fused = len(shape.family.attention.readers) == 1 and not workload.eager_attention
    saved |= {
        "queries": product * query,
        "keys": product * attended,
        "values": product * (numbers_read(shape, "attention") if fused else attended),
        "attention's output": product * query,
        "attention's output, token by token": product * query if fused else 0,
    }
    if workload.eager_attention:
        weights = shape.num_attention_heads * workload.sequence_length
        saved["attention weights"] = FP32 * weights  # softmax runs in fp32
        saved["attention weights in bf16"] = BF16 * weights if workload.bf16 else 0
        saved["capped scores"] = product * weights if shape.family.attention_cap else 0
    else:
        saved["attention's log of sums"] = FP32 * shape.num_attention_heads
    return saved


def saved_by_mlp(shape: Shape, *, workload: Workload, weight_bytes: int) -> dict[str, int]:
    """Bytes per token that a layer's MLP keeps for the backward pass; see `saved_by_layer`."""
    saved = _saved_by_norms(shape, "mlp", workload=workload, weight_bytes=weight_bytes)
    if shape.num_experts:
        return saved | saved_by_experts(shape, product_bytes=workload.product_bytes, masked=workload.masked)
    products = workload.product_bytes * numbers_read(shape, "mlp")
    units = workload.product_bytes * shape.intermediate_size
    saved |= {"MLP's products": products, "MLP's activations": units}
    # Half of the products are gates, and what they let through is what the write reads.
    return saved | ({"MLP's gated products": units} if products > units else {})


def _saved_by_norms(shape: Shape, name: str, *, workload: Workload, weight_bytes: int) -> dict[str, int]:
    """Bytes per token that the norms of a sub-layer keep, and what reads its first norm's output."""
    sublayer, d, product = shape.family.sublayers[name], shape.hidden_size, workload.product_bytes
    saved: dict[str, int] = {}
    for norm in sublayer.norms:
        # The first reads the residual stream, the others what a product put out.
        saved |= saved_by_norm(norm, shape=shape, input_bytes=weight_bytes if norm is sublayer.before else product)
    # Autocast makes a bf16 copy of an activation for each product that reads it; only weights' copies are shared.
    casts = product != weight_bytes
    saved[f"{name}'s input"] = product * d * len(sublayer.readers) if casts else weight_bytes * d
    return saved


def saved_by_norm(norm: Norm, *, shape: Shape, input_bytes: int) -> dict[str, int]:
    """Bytes per token that a norm keeps, without its output; `input_bytes` are those of a number that it reads."""
    width: int = norm.over.size(shape.units())
    factors = width // shape.head_dim if norm.by_head else 1
    if norm.kind.centred:
        return {f"{norm.name}'s input": input_bytes * width, f"{norm.name}'s means and factors": 2 * FP32 * factors}
    return {
        # The input itself where it is fp32, else the copy that the norm is computed from.
        f"{norm.name}'s input": FP32 * width,
        f"{norm.name}'s normalised input": (FP32 if norm.kind.gain_in_fp32 else input_bytes) * width,
        f"{norm.name}'s factors": FP32 * factors,
    }


def kept_by_layer(shape: Shape, *, workload: Workload, weight_bytes: int) -> dict[str, int]:
    """Bytes per token that each decoder layer keeps until the backward pass; see `saved_by_layer`."""
    balance = balance_kept(shape, product_bytes=workload.product_bytes)
    if workload.checkpointing == "none":
        return saved_by_layer(shape, workload=workload, weight_bytes=weight_bytes) | balance
    kept = {"layer's input": weight_bytes * shape.hidden_size} | balance
    if workload.checkpointing == "selective":
        product, query = workload.product_bytes, shape.units()["query_heads"]
        kept |= {
            "query, key and value products": product * numbers_read(shape, "attention"),
            "attention's output": product * query,
            "attention's write": product * shape.hidden_size,
            "MLP's products": product * numbers_read(shape, "mlp"),
            "MLP's write": product * (each_width(shape) if shape.num_experts else shape.hidden_size),
        }
        if workload.eager_attention:
            kept["attention scores"] = product * shape.num_attention_heads * workload.sequence_length
        else:
            kept["attention's log of sums"] = FP32 * shape.num_attention_heads
    return kept


def numbers_read(shape: Shape, name: str) -> int:
    """Numbers per token that the products put out with which a sub-layer reads the residual stream."""
    sublayer, sizes = shape.family.sublayers[name], shape.units()
    if sublayer.experts is not None:
        return width_read(shape)
    widths: list[int] = [sublayer.weight(reader).axes[0].size(sizes) for reader in sublayer.readers]
    return sum(widths)


def entries_of(shape: Shape, name: str, *, writes: bool) -> int:
    """Entries of a sub-layer's matrix that writes into the residual stream, or of those that read it."""
    sublayer = shape.family.sublayers[name]
    matrices = (parameter for parameter in sublayer.linears if len(parameter.axes) > 1)
    found: int = count((each for each in matrices if (each.name in sublayer.written) == writes), shape.units())
    return found


def autocast_parameters(shape: Shape, *, masked: bool) -> int:
    """Weights of a layer's products; without those that masks scale, which are cast each time they are used."""
    # Masks of experts scale what they compute and not their weights.
    uncast = {"attention": masked, "mlp": masked and not shape.num_experts}
    return sum(
        entries_of(shape, name, writes=writes)
        for name, scaled in uncast.items()
        for writes in ((False,) if scaled else (False, True))
    )
