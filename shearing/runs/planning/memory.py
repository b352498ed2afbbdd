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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import torch

from shearing.models.shape import Shape

Checkpointing: TypeAlias = Literal["none", "selective", "full"]
ZeroStage: TypeAlias = Literal[0, 1, 2, 3]
ZERO_STAGES: Sequence[ZeroStage] = (0, 1, 2, 3)

CHECKPOINT_BYTES_PER_PARAMETER = 12
"""Of a checkpoint: the fp32 weight and AdamW's two moments."""

BEFORE_LAYERS = "forward, before the layers"
"""The moment at which a teacher runs, and then the embedding."""

LOSS = "loss"
"""The moment at which logits exist."""

FINAL_NORM = "backward, final norm"
"""The first moment after it."""

EMBEDDING = "backward, embedding"
"""The last moment of the backward pass, as it is estimated; a traced one has the parameter's name."""

FP32 = 4
BF16 = 2
_MOMENTS = 2 * FP32

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
        moving: weights whose masks move with training: what is dropped of them is set aside, in fp32.
        staged: a checkpoint is copied to the host, to be written while training goes on.
    """

    micro_batch_size: int
    micro_batches: int
    sequence_length: int
    bf16: bool
    checkpointing: Checkpointing
    chunk_tokens: int
    masked: bool
    eager_attention: bool = False
    moving: int = 0
    staged: bool = True

    @property
    def tokens(self) -> int:
        """T, tokens of a micro-batch."""
        return self.micro_batch_size * self.sequence_length

    @property
    def product_bytes(self) -> int:
        """Bytes of a number that a matrix product reads or writes."""
        return BF16 if self.bf16 else FP32


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
        shared_by: processes that share out its layers, which are whole while they run; None: each has all of them.
    """

    shape: Shape
    bf16: bool
    buffers: int
    matched_layers: int = 0
    offloaded: bool = False
    shared_by: int | None = None

    @property
    def number_bytes(self) -> int:
        """Bytes of a weight, a hidden state or a logit."""
        return BF16 if self.bf16 else FP32

    @property
    def host(self) -> int:
        """Bytes of its weights in host memory."""
        return self.number_bytes * self._inside if self.offloaded else 0

    @property
    def weights(self) -> int:
        """Bytes of its weights on the device while the student computes."""
        if self.shared_by is not None:
            return self.number_bytes * (self._outside + -(-self._inside // self.shared_by))
        return self.number_bytes * self.shape.num_parameters() - self.host

    @property
    def loaded(self) -> int:
        """Bytes of its weights on the device while it is loaded, or runs: two layers that are shared out are whole.

        What is offloaded is read into host memory, and only what is outside of its layers goes on from there.
        """
        if self.shared_by is None:
            return self.weights
        whole = min(2, self.shape.num_hidden_layers) * sum(self.shape.layer_parameters())
        return self.weights + self.number_bytes * whole * int(self.shared_by > 1)

    def among(self, processes: int) -> Listening:
        """The same, where so many processes share the work."""
        return self if self.shared_by is None else replace(self, shared_by=processes)

    @property
    def _inside(self) -> int:
        return self.shape.num_hidden_layers * sum(self.shape.layer_parameters())

    @property
    def _outside(self) -> int:
        return self.shape.num_parameters() - self._inside


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
        optimizer: AdamW's moments, and the fp32 weights where the model has bf16 ones or ZeRO its own; and what masks
            that move set aside.
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
    gradients = phase.loose + (0 if offload_optimizer and stage >= 2 else FP32 * accumulated)
    sums_apart = stage == 1 and workload.bf16 and not offload_optimizer
    if sums_apart:
        # Sums in fp32 from the start, exchanged where they lie, unless those of matrices and of vectors go together.
        together = phase.name == "optimizer" and total <= _ZERO_SUM_PARAMETERS
        gradients = phase.loose + FP32 * total + (FP32 * total if together else 0)
    elif stage:
        # One bucket is filled while the other is under way, which is in fp32.
        bucket = min(total, _ZERO_BUCKET_PARAMETERS)
        gradients += (2 * weight_bytes + (FP32 if workload.bf16 else 0)) * bucket
    elif sharding.processes > 1 and phase.accumulated:
        parameters = (*shape.outer_parameters(), *shape.family.attention.linears, *shape.family.mlp.linears)
        largest = max(parameter.size(shape.units()) for parameter in parameters)
        gradients += FP32 * min(total, _TORCH_BUCKET_PARAMETERS + largest)

    optimizer = _MOMENTS * total if stage == 0 else (FP32 + _MOMENTS) * share
    if stage and phase.name == "optimizer" and not sums_apart:
        optimizer += FP32 * share  # the gradient of the share, in one piece
    aside = FP32 * sharding.share(workload.moving)
    optimizer += aside if stage else FP32 * workload.moving
    if offload_optimizer:
        optimizer, host = 0, host + (2 * FP32 + _MOMENTS) * share + aside
    return Memory(
        moment=phase.name,
        weights=weights + phase.copies,
        gradients=gradients,
        optimizer=optimizer,
        activations=phase.activations,
        host=host,
        staging=CHECKPOINT_BYTES_PER_PARAMETER * share + aside if workload.staged else 0,
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

    The final norm, and an embedding that is the head too, are whole from the forward pass to the end of the backward
    pass; embedding and head that are two, while each runs forward. Of layers that are let go of, two are whole at a
    time, the one that runs and the one that comes next. What comes, comes in through a buffer of its own.
    """
    total, layer, layers = shape.num_parameters(), sum(shape.layer_parameters()), shape.num_hidden_layers
    share, many = sharding.share(total), sharding.processes > 1
    aside = FP32 * sharding.share(workload.moving)
    passing = 0 if shape.tied else shape.vocab_size * shape.hidden_size  # of each, embedding and head
    gathered = 0
    if phase.name != "optimizer":
        at_end = phase.name in (BEFORE_LAYERS, LOSS)
        running = layers if not way.reshard else 0 if phase.name == LOSS else min(2, layers)
        gathered = total - layers * layer - (1 if at_end else 2) * passing + running * layer
        if many:
            gathered += passing if at_end and passing else layer
    whole = way.sums_once and workload.micro_batches > 1
    gradients = phase.loose + FP32 * (phase.accumulated if whole else sharding.share(phase.accumulated))
    if phase.name.startswith("backward"):
        gradients += _under_way(phase.name, shape=shape, weight_bytes=weight_bytes, passing=passing)
    return Memory(
        moment=phase.name,
        weights=weight_bytes * gathered + phase.copies,
        gradients=gradients,
        optimizer=(FP32 + _MOMENTS) * share + aside,
        activations=phase.activations,
        host=host,
        staging=CHECKPOINT_BYTES_PER_PARAMETER * share + aside if workload.staged else 0,
        teacher=teacher,
    )


def _under_way(moment: str, *, shape: Shape, weight_bytes: int, passing: int) -> int:
    """Bytes of gradients that are being summed by FSDP2 at a moment of the backward pass.

    In a layer its own before they are summed, in the precision of its products; and in fp32 the same and what came
    before it, which is the head's or another layer's. Outside of layers the head's, and in the end the embedding's.
    """
    layer = sum(shape.layer_parameters())
    if moment.endswith(" layer"):
        return (weight_bytes + FP32) * layer + FP32 * (max(passing, layer) if moment.endswith("last layer") else layer)
    last = moment in (EMBEDDING, f"backward, {shape.family.embedding}.weight")
    return FP32 * (shape.vocab_size * shape.hidden_size if last else passing)
