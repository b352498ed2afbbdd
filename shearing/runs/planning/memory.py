"""What a training step holds in memory, from moments at which that can be largest, and what each process holds of them.

What is alive at such a moment is measured (`traced_step`). Which share of weights, gradients and optimiser state a
process has at it follows from how its engine shares them out. The same moments by pure arithmetic, every term a tensor
one can name, are what the measured ones are compared with (`estimate`), and stand for them where a model cannot be
traced. `benchmarks/memory.py` compares both with what allocators measure. Left out are what allocators lose to
fragmentation, the CUDA context and the workspaces of libraries, and what `training.compile` saves.

Legend: d hidden, m intermediate, H query heads, K KV groups, dh head dimension, L layers, V vocabulary; T tokens of a
micro-batch, S positions of a sequence, C tokens of a chunk of the loss, N processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch

from shearing.models.families.axes import count
from shearing.models.families.norms import Norm
from shearing.models.shape import Shape
from shearing.runs.planning.expert_memory import balance_kept, each_width, saved_by_experts, units_per_token, width_read

Checkpointing: TypeAlias = Literal["none", "selective", "full"]
ZeroStage: TypeAlias = Literal[0, 1, 2, 3]

CHECKPOINT_BYTES_PER_PARAMETER = 12
"""Of a checkpoint: the fp32 weight and AdamW's two moments."""

LOSS = "loss"
"""The moment at which logits exist."""

FINAL_NORM = "backward, final norm"
"""The first moment after it."""

_FP32 = 4
_BF16 = 2
_MOMENTS = 2 * _FP32

# Parameters of one exchange between processes: of the torch engine, where the parameter that fills a bucket closes it;
# of DeepSpeed (reduce_bucket_size); the most that ZeRO-3 leaves gathered (stage3_max_live_parameters); and the most of
# separate sums that DeepSpeed puts together.
_TORCH_BUCKET_PARAMETERS = 8 << 20
_ZERO_BUCKET_PARAMETERS = 200_000_000
_ZERO_LIVE_PARAMETERS = 1_000_000_000
_ZERO_SUM_PARAMETERS = 500_000_000


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one process computes in a step.

    Attributes:
        micro_batch_size: sequences per forward pass.
        micro_batches: forward passes per step.
        sequence_length: tokens of a sequence.
        bf16: matrix products in bf16, instead of all in fp32.
        checkpointing: what the backward pass recomputes (`training.activation_checkpointing`).
        chunk_tokens: tokens whose logits exist at the same time.
        masked: masks are being learned.
        eager_attention: attention weights are tensors, instead of a fused kernel's own business.
    """

    micro_batch_size: int
    micro_batches: int
    sequence_length: int
    bf16: bool
    checkpointing: Checkpointing
    chunk_tokens: int
    masked: bool
    eager_attention: bool = False

    @property
    def tokens(self) -> int:
        """T, tokens of a micro-batch."""
        return self.micro_batch_size * self.sequence_length

    @property
    def product_bytes(self) -> int:
        """Bytes of a number that a matrix product reads or writes."""
        return _BF16 if self.bf16 else _FP32


@dataclass(frozen=True, kw_only=True)
class Listening:
    """A teacher, which every process runs for itself.

    Attributes:
        shape: its sizes.
        bf16: its weights and products are bf16 instead of fp32.
        buffers: tensors [C, V] in fp32 beside its logits: its log-probabilities, those that its divergence works with,
            and the student's at a temperature that is not 1.
        matched_layers: layers behind which its residual stream is compared with the student's.
        offloaded: its layers' weights are in host memory, but for the one that runs.
    """

    shape: Shape
    bf16: bool
    buffers: int
    matched_layers: int = 0
    offloaded: bool = False

    @property
    def number_bytes(self) -> int:
        """Bytes of a weight, a hidden state or a logit."""
        return _BF16 if self.bf16 else _FP32

    @property
    def host(self) -> int:
        """Bytes of its weights in host memory."""
        layers = self.shape.num_hidden_layers * sum(self.shape.layer_parameters())
        return self.number_bytes * layers if self.offloaded else 0

    @property
    def weights(self) -> int:
        """Bytes of its weights on the device while the student computes."""
        return self.number_bytes * self.shape.num_parameters() - self.host


@dataclass(frozen=True, kw_only=True)
class Layerwise:
    """How FSDP2 shares out, layer by layer.

    Attributes:
        reshard: a layer's weights are let go of behind its forward pass.
        sums_once: gradients of several micro-batches are added up whole before they are shared out.
    """

    reshard: bool
    sums_once: bool


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """What the processes share out among them.

    Attributes:
        processes: N.
        zero_stage: DeepSpeed's; 0 is also the torch engine, where each process holds everything.
        offload_optimizer: the optimiser's state is in host memory (from stage 1 on).
        offload_parameters: idle weights are in host memory (stage 3).
        layerwise: FSDP2's way of sharing out what ZeRO-3 shares out; None: DeepSpeed's.
    """

    processes: int = 1
    zero_stage: ZeroStage = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    layerwise: Layerwise | None = None

    def share(self, count: int) -> int:
        """Of `count` parameters those that one process has when they are shared out."""
        return -(-count // self.processes)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one process holds at the moment when it holds most.

    Attributes:
        moment: when that is.
        weights: what is multiplied, with the bf16 copies that autocast makes and the layers ZeRO-3 has gathered.
        gradients: of the weights, those that exist at that moment, with the buckets they are exchanged in.
        optimizer: AdamW's moments, and the fp32 weights where the model has bf16 ones or ZeRO its own.
        activations: all that depends on the number of tokens, the loss included.
        host: bytes in host memory beside it: what is offloaded.
        staging: bytes in host memory that a checkpoint adds while it is written: this process's share of it.
        teacher: of a model that is listened to, its weights; of an estimate also its hidden states and chunk.
        traced: whether a step was traced, and not only estimated.
    """

    moment: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int
    staging: int
    teacher: int = 0
    traced: bool = False

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.teacher


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


def weight_dtype(workload: Workload, *, sharding: Sharding) -> torch.dtype:
    """Dtype of the weights that are multiplied: bf16 ones only where fp32 ones are shared out beside them."""
    return torch.bfloat16 if workload.bf16 and sharding.zero_stage else torch.float32


def largest(
    moments: Iterable[Moment],
    *,
    shape: Shape,
    workload: Workload,
    sharding: Sharding,
    teacher: Callable[[str], int] | None,
    host: int,
) -> Memory:
    """What one process holds at the moment when it holds most.

    Args:
        moments: of a step, before anything is shared out.
        shape: of the model that is trained.
        workload: what a step computes.
        sharding: what of it this process holds.
        teacher: bytes that a teacher adds at a moment of a name; None: there is none.
        host: bytes of it in host memory.
    """
    held = _sharded if sharding.layerwise is None else partial(_layer_by_layer, sharding.layerwise)
    return max(
        (
            held(
                moment,
                shape=shape,
                workload=workload,
                sharding=sharding,
                weight_bytes=weight_dtype(workload, sharding=sharding).itemsize,
                teacher=0 if teacher is None else teacher(moment.name),
                host=host,
            )
            for moment in moments
        ),
        key=lambda memory: memory.total,
    )


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
        return weights + _FP32 * waiting * stream
    states = listening.number_bytes * (workload.tokens * shape.hidden_size + matched * stream)
    chunk = rows * shape.vocab_size * (listening.number_bytes + _FP32 * listening.buffers)
    return weights + states + _FP32 * matched * stream + chunk


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
    saved = attention | _saved_by_mlp(shape, workload=workload, weight_bytes=weight_bytes)
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
        "values": product * (_width_read(shape, "attention") if fused else attended),
        "attention's output": product * query,
        "attention's output, token by token": product * query if fused else 0,
    }
    if workload.eager_attention:
        weights = shape.num_attention_heads * workload.sequence_length
        saved["attention weights"] = _FP32 * weights  # softmax runs in fp32
        saved["attention weights in bf16"] = _BF16 * weights if workload.bf16 else 0
        saved["capped scores"] = product * weights if shape.family.attention_cap else 0
    else:
        saved["attention's log of sums"] = _FP32 * shape.num_attention_heads
    return saved


def _saved_by_mlp(shape: Shape, *, workload: Workload, weight_bytes: int) -> dict[str, int]:
    saved = _saved_by_norms(shape, "mlp", workload=workload, weight_bytes=weight_bytes)
    if shape.num_experts:
        return saved | saved_by_experts(shape, product_bytes=workload.product_bytes, masked=workload.masked)
    products = workload.product_bytes * _width_read(shape, "mlp")
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
        saved |= _saved_by_norm(norm, shape=shape, input_bytes=weight_bytes if norm is sublayer.before else product)
    # Autocast makes a bf16 copy of an activation for each product that reads it; only weights' copies are shared.
    casts = product != weight_bytes
    saved[f"{name}'s input"] = product * d * len(sublayer.readers) if casts else weight_bytes * d
    return saved


def _saved_by_norm(norm: Norm, *, shape: Shape, input_bytes: int) -> dict[str, int]:
    """Bytes per token that a norm keeps, without its output; `input_bytes` are those of a number that it reads."""
    width: int = norm.over.size(shape.units())
    factors = width // shape.head_dim if norm.by_head else 1
    if norm.kind.centred:
        return {f"{norm.name}'s input": input_bytes * width, f"{norm.name}'s means and factors": 2 * _FP32 * factors}
    return {
        # The input itself where it is fp32, else the copy that the norm is computed from.
        f"{norm.name}'s input": _FP32 * width,
        f"{norm.name}'s normalised input": (_FP32 if norm.kind.gain_in_fp32 else input_bytes) * width,
        f"{norm.name}'s factors": _FP32 * factors,
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
            "query, key and value products": product * _width_read(shape, "attention"),
            "attention's output": product * query,
            "attention's write": product * shape.hidden_size,
            "MLP's products": product * _width_read(shape, "mlp"),
            "MLP's write": product * (each_width(shape) if shape.num_experts else shape.hidden_size),
        }
        if workload.eager_attention:
            kept["attention scores"] = product * shape.num_attention_heads * workload.sequence_length
        else:
            kept["attention's log of sums"] = _FP32 * shape.num_attention_heads
    return kept


@dataclass(frozen=True)
class Moment:
    """A moment of a step, as it is before anything is shared out.

    Attributes:
        name: for people.
        activations: bytes that depend on the number of tokens, the loss's buffers included.
        copies: bytes of the bf16 copies of weights that autocast has made.
        accumulated: parameters that have their gradient.
        loose: bytes of gradients that are not accumulated yet.
    """

    name: str
    activations: int
    copies: int
    accumulated: int
    loose: int


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
    final_norm = tokens * sum(_saved_by_norm(shape.family.final_norm, shape=shape, input_bytes=weight_bytes).values())
    layer_copies = _BF16 * _autocast_parameters(shape, masked=workload.masked) if casts else 0
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
        loose=_FP32 * head,
    )
    yield Moment(
        name=FINAL_NORM,
        # Gradients of the norm's two ways to its input, of the mean, and two factors of the square's.
        activations=layers * kept + outside + final_norm + stream + 3 * tokens * _FP32 * d,
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
        name="backward, embedding",
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
    write, scaled = _weights(shape, "mlp", writes=True), workload.masked and not shape.num_experts
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
    yield _Part(name="gate", activations=stream + tokens * product * _width_read(shape, "mlp"), finished=write, loose=0)
    released = tokens * sum(_saved_by_mlp(shape, workload=workload, weight_bytes=weight_bytes).values())
    if workload.eager_attention:
        weights = tokens * shape.num_attention_heads * workload.sequence_length
        # In fp32 the gradients before and after the softmax; the weights' bf16 copy is released.
        inside = weights * (2 * _FP32 - (_BF16 if workload.bf16 else 0))
    else:
        inside = tokens * product * (2 * query + 2 * kv)  # gradients of the output, the queries, keys and values
    finished = write + _weights(shape, "mlp", writes=False) + _weights(shape, "attention", writes=True)
    yield _Part(name="attention", activations=stream + inside - released, finished=finished, loose=0)


def _loss_buffers(shape: Shape, *, workload: Workload) -> int:
    """Bytes of the chunked loss beyond hidden states and gradients; see `shearing.objectives.chunked`."""
    rows = min(workload.chunk_tokens, workload.tokens)
    logits, states = rows * shape.vocab_size, rows * shape.hidden_size
    if not workload.bf16:
        # Logits, log probabilities (which become the gradient), and the hidden states' gradient.
        return _FP32 * (2 * logits + states)
    # The gradient's buffer is there from the end of the first chunk on.
    earlier = _BF16 * (logits + states) if rows < workload.tokens else 0
    # Logits and log probabilities, and with them either the logits in fp32 or the gradient in bf16 and the head's.
    softmax = _FP32 * logits + earlier
    products = _BF16 * (logits + shape.vocab_size * shape.hidden_size)
    return (_BF16 + _FP32) * logits + _BF16 * states + max(softmax, products)


def _width_read(shape: Shape, name: str) -> int:
    """Numbers per token that the products put out with which a sub-layer reads the residual stream."""
    sublayer, sizes = shape.family.sublayers[name], shape.units()
    if sublayer.experts is not None:
        return width_read(shape)
    widths: list[int] = [sublayer.weight(reader).axes[0].size(sizes) for reader in sublayer.readers]
    return sum(widths)


def _weights(shape: Shape, name: str, *, writes: bool) -> int:
    """Entries of a sub-layer's matrix that writes into the residual stream, or of those that read it."""
    sublayer = shape.family.sublayers[name]
    matrices = (parameter for parameter in sublayer.linears if len(parameter.axes) > 1)
    found: int = count((each for each in matrices if (each.name in sublayer.written) == writes), shape.units())
    return found


def _autocast_parameters(shape: Shape, *, masked: bool) -> int:
    """Weights of a layer's products; without those that masks scale, which are cast each time they are used."""
    # Masks of experts scale what they compute and not their weights.
    uncast = {"attention": masked, "mlp": masked and not shape.num_experts}
    return sum(
        _weights(shape, name, writes=writes)
        for name, scaled in uncast.items()
        for writes in ((False,) if scaled else (False, True))
    )


def _sharded(
    phase: Moment,
    *,
    shape: Shape,
    workload: Workload,
    sharding: Sharding,
    weight_bytes: int,
    teacher: int,
    host: int,
) -> Memory:
    """What one process holds of a moment, beside what a teacher has on its device and in host memory."""
    stage, total = sharding.zero_stage, shape.num_parameters()
    share = sharding.share(total)
    offload_optimizer = stage > 0 and sharding.offload_optimizer
    offload_parameters = stage == 3 and sharding.offload_parameters

    weights = weight_bytes * (total if stage < 3 else min(total, _ZERO_LIVE_PARAMETERS))
    if stage == 3:
        idle = weight_bytes * share
        weights, host = (weights, host + idle) if offload_parameters else (weights + idle, host)

    # From stage 2 on, gradients go where the optimiser's state is.
    accumulated = phase.accumulated if stage < 2 else sharding.share(phase.accumulated)
    gradients = phase.loose + (0 if offload_optimizer and stage >= 2 else _FP32 * accumulated)
    sums_apart = stage == 1 and workload.bf16 and not offload_optimizer
    if sums_apart:
        # Sums in fp32 from the start, exchanged where they lie, unless those of matrices and of vectors go together.
        together = phase.name == "optimizer" and total <= _ZERO_SUM_PARAMETERS
        gradients = phase.loose + _FP32 * total + (_FP32 * total if together else 0)
    elif stage:
        # One bucket is filled while the other is under way, which is in fp32.
        bucket = min(total, _ZERO_BUCKET_PARAMETERS)
        gradients += (2 * weight_bytes + (_FP32 if workload.bf16 else 0)) * bucket
    elif sharding.processes > 1 and phase.accumulated:
        parameters = (*shape.outer_parameters(), *shape.family.attention.linears, *shape.family.mlp.linears)
        largest = max(parameter.size(shape.units()) for parameter in parameters)
        gradients += _FP32 * min(total, _TORCH_BUCKET_PARAMETERS + largest)

    optimizer = _MOMENTS * total if stage == 0 else (_FP32 + _MOMENTS) * share
    if stage and phase.name == "optimizer" and not sums_apart:
        optimizer += _FP32 * share  # the gradient of the share, in one piece
    if offload_optimizer:
        optimizer, host = 0, host + (2 * _FP32 + _MOMENTS) * share
    return Memory(
        moment=phase.name,
        weights=weights + phase.copies,
        gradients=gradients,
        optimizer=optimizer,
        activations=phase.activations,
        host=host,
        staging=CHECKPOINT_BYTES_PER_PARAMETER * share,
        teacher=teacher,
    )


def _layer_by_layer(
    way: Layerwise,
    phase: Moment,
    *,
    shape: Shape,
    workload: Workload,
    sharding: Sharding,
    weight_bytes: int,
    teacher: int,
    host: int,
) -> Memory:
    """As `_sharded`, under FSDP2.

    What is outside of layers is whole from the forward pass to the end of the backward pass. Of layers that are let go
    of, two are whole at a time, the one that runs and the one that comes next, which comes in through a buffer of its
    own.
    """
    total, layer, layers = shape.num_parameters(), sum(shape.layer_parameters()), shape.num_hidden_layers
    share, many = sharding.share(total), sharding.processes > 1
    gathered = 0
    if phase.name != "optimizer":
        running = layers if not way.reshard else 0 if phase.name == LOSS else min(2, layers)
        gathered = total - layers * layer + running * layer + (layer if many else 0)
    whole = way.sums_once and workload.micro_batches > 1
    gradients = phase.loose + _FP32 * (phase.accumulated if whole else sharding.share(phase.accumulated))
    if phase.name.startswith("backward"):
        # A layer's gradients before they are summed, in the precision of its products; and two layers' in fp32, one of
        # them under way.
        gradients += (weight_bytes + 2 * _FP32) * layer
    return Memory(
        moment=phase.name,
        weights=weight_bytes * gathered + phase.copies,
        gradients=gradients,
        optimizer=(_FP32 + _MOMENTS) * share,
        activations=phase.activations,
        host=host,
        staging=CHECKPOINT_BYTES_PER_PARAMETER * share,
        teacher=teacher,
    )
