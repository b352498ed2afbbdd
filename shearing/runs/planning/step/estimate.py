"""A training step's peak memory by pure arithmetic: its moments, every term a tensor one can name.

What is measured (`traced_step`) is compared with it, and it stands for a model that cannot be traced.

Legend: d hidden, V vocabulary, L layers; T tokens of a micro-batch, C tokens of a chunk of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from shearing.models.shape import Shape
from shearing.runs.planning.memory import (
    BF16,
    EMBEDDING,
    FINAL_NORM,
    FP32,
    LOSS,
    Listening,
    Memory,
    Moment,
    Sharding,
    Workload,
    largest,
    weight_dtype,
)
from shearing.runs.planning.step.expert_memory import units_per_token
from shearing.runs.planning.step.saved import (
    autocast_parameters,
    entries_of,
    kept_by_layer,
    numbers_read,
    saved_by_layer,
    saved_by_mlp,
    saved_by_norm,
)


def estimate(shape: Shape, *, workload: Workload, sharding: Sharding, listening: Listening | None = None) -> Memory:
    """Peak memory of a training step of one process, by arithmetic alone.

    Args:
        shape: the model that is trained: the source's while masks are learned.
        workload: what a step computes.
        sharding: what of it this process holds.
        listening: to whom; None: to nobody.
    """
    moments = _moments(shape, workload=workload, weight_bytes=weight_dtype(workload, sharding=sharding).itemsize)
    taught = None if listening is None else partial(_teacher, listening, shape, workload=workload)
    host = 0 if listening is None else listening.host
    return largest(moments, shape=shape, workload=workload, sharding=sharding, teacher=taught, host=host)


def _teacher(listening: Listening, student: Shape, phase: str, *, workload: Workload) -> int:
    """Bytes that a teacher adds at a moment: its weights always, its last hidden states and a chunk during the loss.

    What its layers compute on the way is gone before the student's activations come, but for the streams that are
    compared. Their differences are kept, and after the loss the gradients that come of them wait for their layers.
    """
    shape, rows = listening.shape, min(workload.chunk_tokens, workload.tokens)
    weights, matched = listening.weights, listening.matched_layers
    stream = workload.tokens * student.hidden_size
    if phase != LOSS:
        # The last layer's has been added to the gradient that comes from above.
        waiting = matched if phase == FINAL_NORM else max(matched - 1, 0) if phase.endswith("last layer") else 0
        return weights + FP32 * waiting * stream
    states = listening.number_bytes * (workload.tokens * shape.hidden_size + matched * stream)
    chunk = rows * shape.vocab_size * (listening.number_bytes + FP32 * listening.buffers)
    return weights + states + FP32 * matched * stream + chunk


def _moments(shape: Shape, *, workload: Workload, weight_bytes: int) -> Iterator[Moment]:
    """The moments of a step's last micro-batch at which memory can be largest."""
    tokens, layers, d = workload.tokens, shape.num_hidden_layers, shape.hidden_size
    product = workload.product_bytes
    casts = product != weight_bytes
    stream = tokens * weight_bytes * d  # the residual stream, or its gradient
    saved = tokens * sum(saved_by_layer(shape, workload=workload, weight_bytes=weight_bytes).values())
    kept = tokens * sum(kept_by_layer(shape, workload=workload, weight_bytes=weight_bytes).values())
    # What is there from the first layer to the end of the backward pass: the embedding's output, which its mask needs,
    # and cosines and sines of the positions.
    outside = (stream if workload.masked else 0) + 2 * weight_bytes * workload.sequence_length * shape.head_dim
    final_norm = tokens * sum(saved_by_norm(shape.family.final_norm, shape=shape, input_bytes=weight_bytes).values())
    layer_copies = BF16 * autocast_parameters(shape, masked=workload.masked) if casts else 0
    # Without recomputation the graph holds all copies; with it, autocast's cache does until the forward pass ends.
    copies_behind = layer_copies * (layers if workload.checkpointing == "none" else 1)

    head = shape.vocab_size * d
    total, layer = shape.num_parameters(), sum(shape.layer_parameters())
    before = total if workload.micro_batches > 1 else 0  # parameters that have a gradient of earlier micro-batches
    # A head that is the embedding too waits for the embedding's gradient; another one's is accumulated at once.
    waiting = weight_bytes * head if shape.tied else 0
    done = 0 if shape.tied else head

    yield Moment(
        name=LOSS,
        # The hidden states and their gradient are of the stream's size.
        activations=layers * kept + outside + final_norm + 2 * stream + _loss_buffers(shape, workload=workload),
        copies=layers * layer_copies + (product * head if casts else 0),
        accumulated=before,
        loose=FP32 * head,
    )
    yield Moment(
        name=FINAL_NORM,
        # Gradients of the norm's two ways to its input, of the mean, and two factors of the square's.
        activations=layers * kept + outside + final_norm + stream + 3 * tokens * FP32 * d,
        copies=copies_behind,
        accumulated=max(before, done),
        loose=waiting,
    )
    for name, behind, finished in (("last", layers - 1, 0), ("first", 0, layers - 1)):
        for part in _layer_backward(shape, workload=workload, weight_bytes=weight_bytes):
            yield Moment(
                name=f"backward, {part.name} of the {name} layer",
                activations=behind * kept + saved + outside + part.activations,
                copies=layer_copies if name == "first" else copies_behind,
                accumulated=max(before, done + finished * layer + part.finished),
                loose=waiting + part.loose,
            )
    yield Moment(
        name=EMBEDDING,
        activations=outside + stream,
        copies=0,
        accumulated=max(before, total - head),
        loose=waiting + weight_bytes * head,
    )
    yield Moment(name="optimizer", activations=0, copies=0, accumulated=total, loose=0)


@dataclass(frozen=True)
class _Part:
    """A moment in the backward pass of a layer.

    Attributes:
        name: of what is differentiated.
        activations: bytes beyond what the layer saved; less than 0 where some of it is released by then.
        finished: parameters of the layer that have their gradient.
        loose: bytes of gradients that are not accumulated yet.
    """

    name: str
    activations: int
    finished: int
    loose: int


def _layer_backward(shape: Shape, *, workload: Workload, weight_bytes: int) -> Iterator[_Part]:
    """The moments at which a layer's backward pass can hold most."""
    tokens, mlp = workload.tokens, shape.family.mlp
    product, sizes = workload.product_bytes, shape.units()
    d, query, kv = (sizes[unit] for unit in ("hidden", "query_heads", "kv_groups"))
    write, scaled = entries_of(shape, "mlp", writes=True), workload.masked and not shape.num_experts
    casts = product != weight_bytes
    stream = tokens * weight_bytes * d
    units = tokens * product * units_per_token(shape)
    yield _Part(
        name=mlp.write.rpartition(".")[2],
        activations=stream + (tokens * product * d if casts else 0) + units,
        finished=0,
        # The gradient, the bf16 one it is cast from, and under masks its product with the weight.
        loose=(weight_bytes + (product if casts else 0) + (weight_bytes if scaled else 0)) * write,
    )
    # The gradients of both factors and of their product, which is itself released.
    yield _Part(
        name="gate", activations=stream + tokens * product * numbers_read(shape, "mlp"), finished=write, loose=0
    )
    released = tokens * sum(saved_by_mlp(shape, workload=workload, weight_bytes=weight_bytes).values())
    if workload.eager_attention:
        weights = tokens * shape.num_attention_heads * workload.sequence_length
        # In fp32 the gradients before and after the softmax; the weights' bf16 copy is released.
        inside = weights * (2 * FP32 - (BF16 if workload.bf16 else 0))
    else:
        inside = tokens * product * (2 * query + 2 * kv)  # gradients of the output, the queries, keys and values
    finished = write + entries_of(shape, "mlp", writes=False) + entries_of(shape, "attention", writes=True)
    yield _Part(name="attention", activations=stream + inside - released, finished=finished, loose=0)


def _loss_buffers(shape: Shape, *, workload: Workload) -> int:
    """Bytes of the chunked loss beyond hidden states and gradients; see `shearing.objectives.chunked`."""
    rows = min(workload.chunk_tokens, workload.tokens)
    logits, states = rows * shape.vocab_size, rows * shape.hidden_size
    if not workload.bf16:
        # Logits, log probabilities (which become the gradient), and the hidden states' gradient.
        return FP32 * (2 * logits + states)
    # The gradient's buffer is there from the end of the first chunk on.
    earlier = BF16 * (logits + states) if rows < workload.tokens else 0
    # Logits and log probabilities, and with them either the logits in fp32 or the gradient in bf16 and the head's.
    softmax = FP32 * logits + earlier
    products = BF16 * (logits + shape.vocab_size * shape.hidden_size)
    return (BF16 + FP32) * logits + BF16 * states + max(softmax, products)
